-- How far did each neuron's values move from one store to the other, in units of what chance moves them?
-- in: moments (store A), moments_b (store B)      out: one row per hook point, layer, neuron and concept that both hold
-- z_mean   (mean_b - mean_a) / standard error, sqrt(s_a^2 / n_a + s_b^2 / n_b), variances not assumed equal (Welch 1947).
--          s^2 = std^2 n / (n - 1) is the unbiased variance.
-- z_std    (s_b^2 - s_a^2) / standard error, from var(s^2) = (m4 - s^4 (n - 3) / (n - 1)) / n (Mood, Graybill and Boes 1974, VI.2),
--          where m4 = kurtosis s^4: heavy tails widen it. Of variances, since s^2 is unbiased and s is not: with heavy tails and
--          100 values, 3 to 5 % of |z| pass 1.96 by chance; of the same z written for s, 7 to 10 %.
-- shift    (mean_b - mean_a) / sqrt((s_a^2 + s_b^2) / 2), the size of the move: it does not grow with n as z does (Cohen 1988).
-- spread   s_b / s_a.
-- Where nothing moved, and no text stands in both stores, z is about N(0, 1): 4.6 % of |z| pass 2, 0.27 % pass 3. With fewer than
-- two values on a side nothing is known: NULL. Where nothing varies on either side, z_mean and shift are 0 for the same value, else
-- infinite.
with pair as (
    select layer, hook_point, neuron, concept, a.n as n_a, b.n as n_b, a.mean as mean_a, b.mean as mean_b,
        a.std as std_a, b.std as std_b, a.min = b.min as same_min,
        a.std * a.std * a.n / nullif(a.n - 1, 0) as var_a, b.std * b.std * b.n / nullif(b.n - 1, 0) as var_b,
        -- No kurtosis is below 1; it is NULL where std is 0, and is then multiplied by it.
        greatest(coalesce(a.kurtosis, 1), 1) as kurtosis_a, greatest(coalesce(b.kurtosis, 1), 1) as kurtosis_b
    from moments a join moments_b b using (layer, hook_point, neuron, concept)
),
error as (
    select *, sqrt(var_a / n_a + var_b / n_b) as error_mean, sqrt((var_a + var_b) / 2) as pooled_std,
        sqrt(var_a * var_a * (kurtosis_a - (n_a - 3) / (n_a - 1)) / n_a
            + var_b * var_b * (kurtosis_b - (n_b - 3) / (n_b - 1)) / n_b) as error_var,
        case when same_min then 0e0 when mean_b > mean_a then 'infinity'::double else '-infinity'::double end as if_constant
    from pair
)
select layer, hook_point, neuron, concept, n_a, n_b, mean_a, mean_b, std_a, std_b,
    case when error_mean > 0 then (mean_b - mean_a) / error_mean when error_mean = 0 then if_constant end as z_mean,
    case when error_var > 0 then (var_b - var_a) / error_var when error_var = 0 then 0e0 end as z_std,
    case when pooled_std > 0 then (mean_b - mean_a) / pooled_std when pooled_std = 0 then if_constant end as shift,
    case
        when var_a > 0 then sqrt(var_b / var_a)
        when var_a = 0 then if(var_b = 0, 1e0, var_b * 'infinity'::double)
    end as spread
from error;
