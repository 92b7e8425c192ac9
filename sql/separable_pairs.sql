-- Which concepts can single neurons tell apart, and which neuron does it best?
-- in: overlap, moments      out: one row per hook point, layer and pair of concepts, the best separated pair first
-- min_ovl is the overlap of the best neuron: its values under the two concepts share that much of their distribution.
-- n_dropped counts the neurons whose row for the pair was not kept (recipe: overlap.keep). The rows that overlap least go first,
-- so that with any dropped the answer is not in the store: all but the counts is NULL.
with width as (
    select hook_point, layer, count(distinct neuron) as width from moments group by all
),
pair as (
    select hook_point, layer, neuron, concept_a, concept_b, coalesce(ovl, ovl_gaussian) as ovl from overlap
),
summary as (
    select hook_point, layer, concept_a, concept_b, count(ovl) as n_neurons, any_value(width) - count(*) as n_dropped,
        min(ovl) as min_ovl, arg_min(neuron, (ovl, neuron)) filter (ovl is not null) as best_neuron,
        median(ovl) as median_ovl, avg((ovl < 0.5)::integer) as share_below_half
    from pair left join width using (hook_point, layer)
    group by all
    having count(ovl) > 0
)
select hook_point, layer, concept_a, concept_b, n_neurons, n_dropped,
    if(n_dropped = 0, min_ovl, null) as min_ovl, if(n_dropped = 0, best_neuron, null) as best_neuron,
    if(n_dropped = 0, median_ovl, null) as median_ovl, if(n_dropped = 0, share_below_half, null) as share_below_half
from summary
order by min_ovl nulls last, hook_point, layer, concept_a, concept_b;
