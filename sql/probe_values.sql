-- Which values does a linear probe of one layer learn from?
-- in: activations, $hook_point, $layer      out: value, neuron by neuron, in the order of probe_rows.sql
select value
from activations
where hook_point = $hook_point and layer = $layer
order by neuron, sample, position;
