-- Under which concepts are a layer's neurons near-Gaussian?
-- in: gaussianity      out: one row per hook point, layer and concept: the share of neurons with skewness in (-1, 1) and kurtosis
--     in [2, 5], of those whose values vary
select hook_point, layer, concept, count(*) as n_neurons, avg(near_gaussian::integer) as share_near_gaussian
from gaussianity
where skewness is not null
group by hook_point, layer, concept
order by hook_point, layer, concept;
