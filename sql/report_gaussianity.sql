-- How close to a Gaussian are the values of a neuron under one concept, layer by layer?
-- in: gaussianity      out: one row per hook point and layer
-- A bump is one neuron under one concept; those without spread are counted and left out. p05 and p95 are quantiles over bumps.
-- ks is the distance to the Gaussian of the same mean and std, from the histogram; NULL where the store has none.
with bump as (
    select * from gaussianity where skewness is not null
),
constant as (
    select hook_point, layer, count(*) as n_constant from gaussianity where skewness is null group by hook_point, layer
),
summary as (
    select hook_point, layer, count(*) as n_bumps, avg(near_gaussian::integer) as share_near_gaussian,
        quantile_cont(skewness, [0.05, 0.5, 0.95]) as skewness,
        quantile_cont(excess_kurtosis, [0.05, 0.5, 0.95]) as excess_kurtosis,
        quantile_cont(ks, [0.05, 0.5, 0.95]) as ks, median(ks_bound) as ks_bound, median(jarque_bera) as jarque_bera
    from bump
    group by hook_point, layer
)
select hook_point, layer, n_bumps, coalesce(n_constant, 0) as n_constant, share_near_gaussian,
    skewness[1] as p05_skewness, skewness[2] as median_skewness, skewness[3] as p95_skewness,
    excess_kurtosis[1] as p05_excess_kurtosis, excess_kurtosis[2] as median_excess_kurtosis,
    excess_kurtosis[3] as p95_excess_kurtosis,
    ks[1] as p05_ks, ks[2] as median_ks, ks[3] as p95_ks, ks_bound as median_ks_bound, jarque_bera as median_jarque_bera
from summary left join constant using (hook_point, layer)
order by hook_point, layer;
