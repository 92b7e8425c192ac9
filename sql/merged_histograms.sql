-- How many values of every neuron fell in each bin under one concept, over all its shards?
-- in: histograms, $hook_point, $layer, $concept
-- out: layer, hook_point, neuron, concept, bin, n, in the order of neurons, so that a block of neurons is a short read
-- Neuron and bin (-208 to 208) in one integer: half the time of grouping by two columns.
with merged as (
    select neuron::bigint * 512 + bin + 256 as slot, sum(n)::bigint as n
    from histograms
    where hook_point = $hook_point and layer = $layer and concept = $concept
    group by slot
)
select $layer::smallint as layer, $hook_point::varchar as hook_point, (slot // 512)::integer as neuron,
    $concept::varchar as concept, (slot % 512 - 256)::smallint as bin, n
from merged
order by slot;
