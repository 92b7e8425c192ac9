-- How are one neuron's values spread under each concept?
-- in: histograms, $hook_point, $layer, $neuron      out: one row per concept and bin that holds a value, in the order of values
select concept, bin, any_value(lower) as lower, any_value(upper) as upper, sum(n)::bigint as n
from histograms
where hook_point = $hook_point and layer = $layer and neuron = $neuron
group by concept, bin
order by concept, bin;
