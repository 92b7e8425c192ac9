-- Of which texts are the values that a linear probe of one layer learns from?
-- in: activations, $hook_point, $layer      out: sample, concept, one row per text and position, in their order
-- Every neuron has the same rows; one of them names them all.
select sample, concept
from activations
where hook_point = $hook_point and layer = $layer
    and neuron = (select min(neuron) from activations where hook_point = $hook_point and layer = $layer)
order by sample, position;
