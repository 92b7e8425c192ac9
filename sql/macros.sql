-- Which formulas do the queries share? Run this file once per session, before merge.sql, moments_from_raw.sql or overlap.sql.
-- in: nothing      out: scalar macros

-- Cumulative distribution of the standard Gaussian, within 3e-15: DuckDB has no erf (Hart 1968, algorithm 5666, as given by
-- West 2005).
create or replace macro normal_tail(t) as  -- P(X > t) for t >= 0
    case
        when t > 37 then 0e0
        when t < 7.07106781186547e0 then
            exp(-t * t / 2)
            * ((((((3.52624965998911e-2 * t + 0.700383064443688e0) * t + 6.37396220353165e0) * t + 33.912866078383e0) * t
                + 112.079291497871e0) * t + 221.213596169931e0) * t + 220.206867912376e0)
            / (((((((8.83883476483184e-2 * t + 1.75566716318264e0) * t + 16.064177579207e0) * t + 86.7807322029461e0) * t
                + 296.564248779674e0) * t + 637.333633378831e0) * t + 793.826512519948e0) * t + 440.413735824752e0)
        else exp(-t * t / 2) / (t + 1 / (t + 2 / (t + 3 / (t + 4 / (t + 0.65e0))))) / 2.506628274631e0
    end;
create or replace macro normal_cdf(x) as if(x > 0, 1 - normal_tail(abs(x)), normal_tail(abs(x)));
create or replace macro erf(x) as 2 * normal_cdf(x * sqrt(2e0)) - 1;

-- Bhattacharyya coefficient of two Gaussians. A std of 0 is a point: two equal points give 1, any other two things 0.
create or replace macro bhattacharyya(mean_a, std_a, mean_b, std_b) as
    case
        when std_a = 0 and std_b = 0 then (mean_a = mean_b)::double
        else sqrt(2 * std_a * std_b / (std_a * std_a + std_b * std_b))
            * exp(-(mean_a - mean_b) * (mean_a - mean_b) / (4 * (std_a * std_a + std_b * std_b)))
    end;

-- Length of the intersection over length of the union of two closed ranges; two equal points count as 1.
create or replace macro range_jaccard(lower_a, upper_a, lower_b, upper_b) as
    case
        when lower_a is null or lower_b is null then null
        when lower_a = lower_b and upper_a = upper_b then 1e0
        when least(upper_a, upper_b) <= greatest(lower_a, lower_b) then 0e0
        else (least(upper_a, upper_b) - greatest(lower_a, lower_b)) / (greatest(upper_a, upper_b) - least(lower_a, lower_b))
    end;

-- Second, third and fourth moment around the mean, from sums s1 to s4 of powers of the distance from a centre near it: s1 / n is
-- what remains of the mean.
create or replace macro central_2(n, s1, s2) as s2 / n - (s1 / n) * (s1 / n);
create or replace macro central_3(n, s1, s2, s3) as s3 / n - (s1 / n) * (3 * s2 / n - 2 * (s1 / n) * (s1 / n));
create or replace macro central_4(n, s1, s2, s3, s4) as
    s4 / n - (s1 / n) * (4 * s3 / n - (s1 / n) * (6 * s2 / n - 3 * (s1 / n) * (s1 / n)));
create or replace macro skewness_of(c3, std) as if(std > 0, c3 / (std * std * std), null);
create or replace macro kurtosis_of(c4, std) as if(std > 0, c4 / (std * std * std * std), null);

-- Close enough to a Gaussian for a range to make sense: skewness in (-1, 1) and kurtosis in [2, 5], where a Gaussian has 0 and 3.
create or replace macro near_gaussian(skewness, kurtosis, max_skewness := 1, min_kurtosis := 2, max_kurtosis := 5) as
    abs(skewness) < max_skewness and kurtosis between min_kurtosis and max_kurtosis;

-- The range mean +- tau * std; a tau of infinity takes the whole line, also where std is 0.
create or replace macro range_lower(mean, std, tau) as
    case when isinf(tau) and mean is not null then '-infinity'::double else mean - tau * std end;
create or replace macro range_upper(mean, std, tau) as
    case when isinf(tau) and mean is not null then 'infinity'::double else mean + tau * std end;

-- Edges of a histogram bin (docs/store-format.md). The outermost bins take every value beyond them: they have no outer edge.
create or replace macro bin_edge(k) as  -- lower edge of bin k, k from 1 to 209
    pow(2e0, -14 + (k - 1) // 8) * (1 + ((k - 1) % 8) / 8e0);
create or replace macro bin_lower(bin) as
    case when bin <= -208 then '-infinity'::double when bin > 0 then bin_edge(bin) else -bin_edge(1 - bin) end;
create or replace macro bin_upper(bin) as -bin_lower(-bin);

-- How much of the bin [bottom, top] lies inside [lower, upper]: a share of its length, or 1 or 0 for a bin without length.
create or replace macro part_inside(bottom, top, lower, upper) as
    case
        when top > bottom then greatest(0e0, least(top, upper) - greatest(bottom, lower)) / (top - bottom)
        else (bottom between lower and upper)::double
    end;
