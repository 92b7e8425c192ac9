-- How are the values of every neuron of a layer spread under each concept, and where do the other concepts lie?
-- in: moments, $hook_point, $layer
-- out: one row per neuron and concept: neuron, concept, n, mean, std, min, max, and mean_others, the mean over the values of all
--     other concepts together; NULL where no other concept has any
select neuron, concept, n, mean, std, min, max,
    sum(n * mean) over others / nullif(sum(n) over others, 0) as mean_others
from moments
where hook_point = $hook_point and layer = $layer
window others as (partition by neuron rows between unbounded preceding and unbounded following exclude current row)
order by neuron, concept;
