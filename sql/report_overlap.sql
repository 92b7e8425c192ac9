-- How far do neurons share their values between two concepts, layer by layer?
-- in: overlap_by_layer, $concepts (a list)      out: one row per hook point, layer and pair of those concepts
select hook_point, layer, concept_a, concept_b, mean_ovl
from overlap_by_layer
where list_contains($concepts::varchar[], concept_a) and list_contains($concepts::varchar[], concept_b)
order by hook_point, layer, concept_a, concept_b;
