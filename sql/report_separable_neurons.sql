-- Which neurons keep all concepts apart best?
-- in: salience (selectivity: one minus a concept's mean overlap with the others), moments, $n_neurons
-- out: per hook point the $n_neurons neurons with the least overlap, meant over all pairs of concepts; only neurons whose values
--     vary under every concept
with varying as (
    select hook_point, layer, neuron from moments group by hook_point, layer, neuron having min(coalesce(std, 0)) > 0
),
apart as (
    select hook_point, layer, neuron, 1 - avg(score) as mean_ovl
    from salience
    where method = 'selectivity' and score is not null
    group by hook_point, layer, neuron
)
select hook_point, layer, neuron, mean_ovl
from apart join varying using (hook_point, layer, neuron)
qualify row_number() over (partition by hook_point order by mean_ovl, layer, neuron) <= $n_neurons
order by hook_point, mean_ovl, layer, neuron;
