-- Which concepts share their values with others the most, over all layers?
-- in: overlap_by_layer, $n_concepts      out: at most $n_concepts concepts, those with the most overlap, in the order of names
with side as (
    select concept_a as concept, n_neurons * mean_ovl as shared from overlap_by_layer
    union all
    select concept_b, n_neurons * mean_ovl from overlap_by_layer
)
select concept
from (
    select concept, sum(shared) as shared from side group by concept order by shared desc nulls last, concept limit $n_concepts
)
order by concept;
