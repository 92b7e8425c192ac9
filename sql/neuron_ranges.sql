-- Which ranges does a range table give one neuron?
-- in: ranges, $table_id, $hook_point, $layer, $neuron      out: one row per concept and piece, in this order
-- No row comes of a concept for which the neuron is not salient. A table of method paper has one piece a concept, without a posterior.
select concept, rank, lower, upper, posterior
from ranges
where table_id = $table_id and hook_point = $hook_point and layer = $layer and neuron = $neuron
order by concept, piece;
