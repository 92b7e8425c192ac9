-- How much did the neurons of each hook point, layer and concept drift, beside what chance gives?
-- in: drift (the rows of drift.sql)
-- out: one row per hook point, layer and concept, those that drift most first; before them one of all, whose keys are NULL
-- By chance, share_beyond_2 is 0.0455, share_beyond_3 is 0.0027 and the median |z| is 0.674. min_n is the smallest number of values
-- behind a neuron on either side. median_factor is that of s_b / s_a or its inverse, whichever is above 1.
select hook_point, layer, concept, count(*) as n_neurons, count(z_mean) as n_compared, min(least(n_a, n_b)) as min_n,
    avg((abs(z_mean) > 2)::integer) as mean_share_beyond_2, avg((abs(z_mean) > 3)::integer) as mean_share_beyond_3,
    median(abs(z_mean)) as mean_median_z, median(abs(shift)) as median_shift,
    arg_max(neuron, (abs(z_mean), -neuron)) filter (z_mean is not null) as mean_top_neuron,
    arg_max(z_mean, (abs(z_mean), -neuron)) filter (z_mean is not null) as mean_top_z,
    avg((abs(z_std) > 2)::integer) as std_share_beyond_2, avg((abs(z_std) > 3)::integer) as std_share_beyond_3,
    median(abs(z_std)) as std_median_z, median(if(spread = 0, 'infinity'::double, greatest(spread, 1 / spread))) as median_factor,
    arg_max(neuron, (abs(z_std), -neuron)) filter (z_std is not null) as std_top_neuron,
    arg_max(z_std, (abs(z_std), -neuron)) filter (z_std is not null) as std_top_z
from drift
group by grouping sets ((hook_point, layer, concept), ())
order by hook_point is not null, mean_median_z desc nulls last, hook_point, layer, concept;
