-- How close to a Gaussian are the values of a neuron under one concept, layer by layer?
-- in: moments      out: one row per hook point and layer, deepest last
-- A Gaussian has skewness 0 and kurtosis 3. share_near_gaussian counts skewness in (-1, 1) with kurtosis in [2, 5].
select hook_point, layer, count(*) as n_bumps,
    median(skewness) as median_skewness, median(abs(skewness)) as median_abs_skewness, median(kurtosis) as median_kurtosis,
    quantile_cont(kurtosis, 0.95) as p95_kurtosis, max(kurtosis) as max_kurtosis,
    avg((abs(skewness) < 1 and kurtosis between 2 and 5)::integer) as share_near_gaussian
from moments
where n >= 2 and std > 0
group by hook_point, layer
order by hook_point, layer;
