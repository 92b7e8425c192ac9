-- Which neurons serve the most concepts, and still give each concept values of its own?
-- in: polysemantic, salience (selectivity: one minus a concept's mean overlap with the others), moments, $n_neurons
-- out: per hook point the $n_neurons neurons that are salient for the most concepts; among equals, those whose concepts overlap
--     least come first. mean_ovl is over the concepts that the neuron is salient for, each with all others. Neurons that have one
--     value for all texts are left out.
with apart as (
    select hook_point, layer, neuron, concept, 1 - score as mean_ovl from salience where method = 'selectivity'
),
varying as (
    select hook_point, layer, neuron from moments group by hook_point, layer, neuron having max(std) > 0 or min(mean) < max(mean)
),
served as (
    select p.hook_point, p.layer, p.neuron, any_value(p.n_concepts) as n_concepts, any_value(p.concepts) as concepts,
        avg(a.mean_ovl) as mean_ovl
    from (select *, unnest(concepts) as concept from polysemantic) p
    left join apart a using (hook_point, layer, neuron, concept)
    group by p.hook_point, p.layer, p.neuron
)
select hook_point, layer, neuron, n_concepts, mean_ovl, concepts
from served join varying using (hook_point, layer, neuron)
where n_concepts >= 2
qualify row_number() over (
    partition by hook_point order by n_concepts desc, mean_ovl nulls last, layer, neuron
) <= $n_neurons
order by hook_point, n_concepts desc, mean_ovl nulls last, layer, neuron;
