-- How far do two concepts share a neuron's values, and how many values of one fall inside the other's range?
-- in: moments, histograms (may be empty), $hook_point, $layer, $first_neuron, $last_neuron, $tau; the macros of macros.sql
-- out: one row per neuron and unordered pair of concepts, concept_a < concept_b, as table `overlap` of docs/store-format.md
-- Neurons do not meet each other: a layer in blocks of neurons gives the same rows as the layer at once, in memory for one block.
-- ovl is the overlapping coefficient, the sum over bins of the smaller share: 1 for the same distribution, 0 for disjoint ones
--     (Inman and Bradley 1989). ovl_gaussian and bhattacharyya (BC) take both for Gaussians:
--     1 - sqrt(1 - BC^2) <= ovl_gaussian <= BC.
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
    where hook_point = $hook_point and layer = $layer and neuron between $first_neuron and $last_neuron
),
counts as materialized (
    select h.neuron, c.code // 8 as block, h.bin,
        sum(h.n::double) filter (c.code % 8 = 0) as n0, sum(h.n::double) filter (c.code % 8 = 1) as n1,
        sum(h.n::double) filter (c.code % 8 = 2) as n2, sum(h.n::double) filter (c.code % 8 = 3) as n3,
        sum(h.n::double) filter (c.code % 8 = 4) as n4, sum(h.n::double) filter (c.code % 8 = 5) as n5,
        sum(h.n::double) filter (c.code % 8 = 6) as n6, sum(h.n::double) filter (c.code % 8 = 7) as n7
    from histograms h join (select distinct concept, code from concept_range) c using (concept)
    where h.hook_point = $hook_point and h.layer = $layer and h.neuron between $first_neuron and $last_neuron
    group by all
),
total as materialized (
    select neuron, block, sum(columns('^n(\d)$')) as 't\1' from counts group by all
),
-- In the order of neurons, so that what the steps below look up for one neuron is still in the processor's cache for its next
-- row: a third less time for a layer of 14,336 neurons.
shares as materialized (
    select neuron, block, bin, bin_lower(bin) as bottom, bin_upper(bin) as top,
        coalesce(n0 / t0, 0) as p0, coalesce(n1 / t1, 0) as p1, coalesce(n2 / t2, 0) as p2, coalesce(n3 / t3, 0) as p3,
        coalesce(n4 / t4, 0) as p4, coalesce(n5 / t5, 0) as p5, coalesce(n6 / t6, 0) as p6, coalesce(n7 / t7, 0) as p7
    from counts join total using (neuron, block)
    order by neuron
),
has_histogram as (
    select neuron, block * 8 + slot as code
    from (
        select neuron, block, unnest([t0, t1, t2, t3, t4, t5, t6, t7]) as total, unnest(range(8)) as slot from total
    )
    where total > 0
),
one_concept as (
    select neuron, bin, block * 8 + slot as code, share
    from (
        select neuron, bin, block, unnest([p0, p1, p2, p3, p4, p5, p6, p7]) as share, unnest(range(8)) as slot
        from shares
    )
    where share > 0
),
-- The sum of the smaller shares, of concept `code` with each of the 8 of `block`.
shared_block as (
    select a.neuron, a.code, b.block, sum(least(a.share, columns('^p(\d)$'))) as 'm\1'
    from one_concept a join shares b on a.neuron = b.neuron and a.bin = b.bin and b.block >= a.code // 8
    group by all
),
shared as (
    select neuron, code, block * 8 + slot as other, mass
    from (
        select neuron, code, block, unnest([m0, m1, m2, m3, m4, m5, m6, m7]) as mass, unnest(range(8)) as slot
        from shared_block
    )
    where block * 8 + slot > code
),
-- What lies inside the range of concept `code`: whole bins first, 8 concepts at once, then the bins that the range cuts.
whole_block as (
    select a.neuron, a.code, b.block, sum(columns('^p(\d)$')) as 'm\1'
    from concept_range a join shares b on a.neuron = b.neuron and b.bottom >= a.lower and b.top <= a.upper
    group by all
),
whole as (
    select neuron, code, block, unnest([m0, m1, m2, m3, m4, m5, m6, m7]) as mass, unnest(range(8)) as slot
    from whole_block
),
-- Materialized, because DuckDB 2.0.0 breaks off with an internal error where unnest follows a join directly.
cut_block as materialized (
    select a.neuron, a.code, a.lower, a.upper, b.block, b.bottom, b.top, b.p0, b.p1, b.p2, b.p3, b.p4, b.p5, b.p6, b.p7
    from concept_range a join shares b on a.neuron = b.neuron
        and b.bottom <= a.upper and b.top >= a.lower and not (b.bottom >= a.lower and b.top <= a.upper)
),
cut as (
    select neuron, code, lower, upper, block, bottom, top,
        unnest([p0, p1, p2, p3, p4, p5, p6, p7]) as share, unnest(range(8)) as slot
    from cut_block
),
cut_mass as (
    select c.neuron, c.code, b.code as other,
        c.share * part_inside(greatest(c.bottom, b.min), least(c.top, b.max), c.lower, c.upper) as mass
    from cut c join concept_range b on c.neuron = b.neuron and c.block * 8 + c.slot = b.code
    where c.share > 0
),
inside as (
    select neuron, code, other, least(1, sum(mass)) as mass
    from (
        select neuron, code, block * 8 + slot as other, mass from whole where mass > 0
        union all
        select neuron, code, other, mass from cut_mass
    )
    group by all
),
concept as (
    select r.*, h.code is not null as has_histogram from concept_range r left join has_histogram h using (neuron, code)
),
-- In the unit of the narrower Gaussian and from its mean, the other one is N(gap, ratio), gap >= 0, ratio >= 1. Their densities
-- cross at two points (the far one at -infinity for equal widths), and the narrower is the larger between them. The steps are
-- columns, because a formula inside a formula is worked out again at every place where it stands.
pair as (
    select a.neuron, a.code as code_a, b.code as code_b, a.concept as concept_a, b.concept as concept_b,
        if(a.has_histogram and b.has_histogram, coalesce(shared.mass, 0), null) as ovl,
        bhattacharyya(a.mean, a.std, b.mean, b.std) as bhattacharyya,
        range_jaccard(a.lower, a.upper, b.lower, b.upper) as range_jaccard,
        a.lower is not null and b.has_histogram as can_be_in_a,
        b.lower is not null and a.has_histogram as can_be_in_b,
        case when a.std = 0 or b.std = 0 then (a.std = b.std and a.mean = b.mean)::double end as ovl_of_points,
        abs(a.mean - b.mean) / least(a.std, b.std) as gap,
        greatest(a.std, b.std) / least(a.std, b.std) as ratio
    from concept a
    join concept b on a.neuron = b.neuron and a.code < b.code
    left join shared on shared.neuron = a.neuron and shared.code = a.code and shared.other = b.code
),
crossing_root as (
    select *, ratio * sqrt(gap * gap + 2 * (ratio * ratio - 1) * ln(ratio)) as root from pair
),
crossing as (
    select *, -(gap + root) / (ratio * ratio - 1) as x1, (gap * gap + 2 * ratio * ratio * ln(ratio)) / (gap + root) as x2
    from crossing_root
),
crossing_seen_by_both as (
    select *, (x1 - gap) / ratio as z1, (x2 - gap) / ratio as z2 from crossing
)
select $layer::smallint as layer, $hook_point::varchar as hook_point, p.neuron, p.concept_a, p.concept_b, $tau::float as tau,
    p.ovl::float as ovl,
    case
        when p.ovl_of_points is not null then p.ovl_of_points
        when p.gap = 0 and p.ratio = 1 then 1
        when p.gap is not null then least(1, greatest(0, normal_cdf(x1) + normal_cdf(z2) - normal_cdf(z1) + 1 - normal_cdf(x2)))
    end::float as ovl_gaussian,
    p.bhattacharyya::float as bhattacharyya,
    p.range_jaccard::float as range_jaccard,
    if(p.can_be_in_a, coalesce(in_a.mass, 0), null)::float as b_in_a,
    if(p.can_be_in_b, coalesce(in_b.mass, 0), null)::float as a_in_b
from crossing_seen_by_both p
left join inside in_a on in_a.neuron = p.neuron and in_a.code = p.code_a and in_a.other = p.code_b
left join inside in_b on in_b.neuron = p.neuron and in_b.code = p.code_b and in_b.other = p.code_a
order by p.neuron, p.concept_a, p.concept_b;
