-- Which pairs of concepts do single neurons tell apart, and which neuron does it best?
-- in: overlap      out: one row per hook point, layer and pair of concepts, the best separated pair first
-- min_ovl is the overlap of the best neuron: its values under the two concepts share that much of their distribution.
with pair as (
    select hook_point, layer, neuron, concept_a, concept_b, coalesce(ovl, ovl_gaussian) as ovl from overlap
)
select hook_point, layer, concept_a, concept_b, count(ovl) as n_neurons, min(ovl) as min_ovl,
    arg_min(neuron, (ovl, neuron)) as best_neuron,
    median(ovl) as median_ovl, avg((ovl < 0.5)::integer) as share_below_half
from pair
where ovl is not null
group by all
order by min_ovl, hook_point, layer, concept_a, concept_b;
