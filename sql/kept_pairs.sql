-- Which pairs of concepts does a neuron tell apart the least?
-- in: overlap, $hook_point, $layer, $top, $threshold
-- out: of every neuron, the rows of `overlap` with ovl (ovl_gaussian where there is no histogram) of $threshold or more, and of
--     those the $top with the largest, ties broken by the concepts' names
-- null for $threshold or $top is no limit.
select layer, hook_point, neuron, concept_a, concept_b, tau, ovl, ovl_gaussian, bhattacharyya, range_jaccard, b_in_a, a_in_b
from overlap
where hook_point = $hook_point and layer = $layer
    and ($threshold::double is null or coalesce(ovl, ovl_gaussian) >= $threshold::float)
qualify $top::bigint is null or row_number() over (
    partition by neuron order by coalesce(ovl, ovl_gaussian) desc nulls last, concept_a, concept_b
) <= $top
order by neuron, concept_a, concept_b;
