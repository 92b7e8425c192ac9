-- How far do any two concepts share the values of each neuron of a block?
-- in: overlap, $hook_point, $layer, $first_neuron, $last_neuron      out: one row per neuron and pair of concepts, in that order
select neuron, concept_a, concept_b, tau, ovl, ovl_gaussian, bhattacharyya, range_jaccard, b_in_a, a_in_b
from overlap
where hook_point = $hook_point and layer = $layer and neuron between $first_neuron and $last_neuron
order by neuron, concept_a, concept_b;
