-- How far do two concepts share a neuron's values, and how many values of one fall inside the other's range?
-- in: moments, histograms (may be empty), $hook_point, $layer, $tau; the macros of macros.sql
-- out: one row per neuron and unordered pair of concepts, concept_a < concept_b, as table `overlap` of docs/store-format.md
-- ovl is the overlapping coefficient, the sum over bins of the smaller share: 1 for the same distribution, 0 for disjoint ones
--     (Inman and Bradley 1989). ovl_gaussian and bhattacharyya take both for Gaussians: 1 - sqrt(1 - BC^2) <= ovl_gaussian <= BC.
-- b_in_a is the share of b's values inside mean_a +- tau * std_a, straight-line inside the bins that the range cuts; a bin
--     reaches no further than b's own min and max.
-- Without finite values of either concept (n = 0) every score is NULL; without a histogram, ovl, b_in_a and a_in_b are.
-- A std of 0 makes a point: two equal points overlap by 1, any other two things by 0.
--
-- Bins lie in rows that hold 8 concepts side by side, so that one pass over the rows of one concept meets 8 others at once:
-- half the time of joining bins to bins, and it works for any number of concepts.
with concept_range as materialized (
    select neuron, concept, dense_rank() over (order by concept) - 1 as code, mean, std, min::double as min, max::double as max,
        range_lower(mean, std, $tau) as lower, range_upper(mean, std, $tau) as upper
    from moments
    where hook_point = $hook_point and layer = $layer
),
counts as materialized (
    select h.neuron, c.code // 8 as block, h.bin,
        sum(h.n::double) filter (c.code % 8 = 0) as n0, sum(h.n::double) filter (c.code % 8 = 1) as n1,
        sum(h.n::double) filter (c.code % 8 = 2) as n2, sum(h.n::double) filter (c.code % 8 = 3) as n3,
        sum(h.n::double) filter (c.code % 8 = 4) as n4, sum(h.n::double) filter (c.code % 8 = 5) as n5,
        sum(h.n::double) filter (c.code % 8 = 6) as n6, sum(h.n::double) filter (c.code % 8 = 7) as n7
    from histograms h join (select distinct concept, code from concept_range) c using (concept)
    where h.hook_point = $hook_point and h.layer = $layer
    group by all
),
total as materialized (
    select neuron, block, sum(columns('^n(\d)$')) as 't\1' from counts group by all
),
-- NULL where a concept has no value in the bin.
shares as materialized (
    select neuron, block, bin, bin_lower(bin) as bottom, bin_upper(bin) as top,
        n0 / t0 as p0, n1 / t1 as p1, n2 / t2 as p2, n3 / t3 as p3, n4 / t4 as p4, n5 / t5 as p5, n6 / t6 as p6, n7 / t7 as p7
    from counts join total using (neuron, block)
),
has_histogram as (
    select neuron, block * 8 + slot as code
    from (
        select neuron, block, unnest([t0, t1, t2, t3, t4, t5, t6, t7]) as total, unnest([0, 1, 2, 3, 4, 5, 6, 7]) as slot from total
    )
    where total is not null
),
one_concept as (
    select neuron, bin, block * 8 + slot as code, share
    from (
        select neuron, bin, block, unnest([p0, p1, p2, p3, p4, p5, p6, p7]) as share, unnest([0, 1, 2, 3, 4, 5, 6, 7]) as slot
        from shares
    )
    where share is not null
),
shared as (  -- the sum of the smaller shares, of concept `code` with the 8 of `block`
    select a.neuron, a.code, b.block, sum(least(a.share, coalesce(columns(b.* like 'p_'), 0)))
    from one_concept a join shares b on a.neuron = b.neuron and a.bin = b.bin and a.code // 8 <= b.block
    group by all
)
from shared limit 1
