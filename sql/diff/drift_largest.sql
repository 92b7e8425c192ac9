-- Which neurons drifted most, in their mean or in their standard deviation?
-- in: drift (the rows of drift.sql), $top, how many      out: its rows, the largest of |z_mean| and |z_std| first
select *
from drift
where z_mean is not null
order by greatest(abs(z_mean), abs(z_std)) desc, abs(shift) desc, hook_point, layer, neuron, concept
limit $top;
