-- What does one neuron do? Questions with arguments, as table macros: from ar(layer := 3, neuron := 7, concept := 'joy').
-- in: the views of views.sql and analysis.sql, the macros of macros.sql
-- out: ar, capture, ovl, quantile_of, ks_exact, neuron_card
-- Every macro takes hook_point; without it, all hook points of the store answer. A bare name in a macro is its argument before it is
-- a column, so columns stand with their table, and inside site, label and j are those that the arguments would hide.

-- The range of one concept at a neuron (Haider et al. 2026): mean -+ tau * std.
create or replace macro ar(layer, neuron, concept, tau := 2.5, hook_point := null) as table
select m.hook_point, m.n, m.mean, m.std, range_lower(m.mean, m.std, tau::double) as lower,
    range_upper(m.mean, m.std, tau::double) as upper
from moments m
where m.layer = layer and m.neuron = neuron and m.concept = concept and (hook_point is null or m.hook_point = hook_point);

-- Which share of each concept's values does the range of `concept` take? `share` counts the histogram, straight-line inside the
-- bins that the range cuts, a bin reaching no further than the concept's own min and max; `share_gaussian` takes the values for
-- Gaussian. For `concept` itself it is what the range takes of its own values.
create or replace macro capture(layer, neuron, concept, tau := 2.5, hook_point := null) as table
with own as (
    select m.hook_point as site, m.concept as label, m.n, m.mean, m.std, m.min, m.max
    from moments m
    where m.layer = layer and m.neuron = neuron and (hook_point is null or m.hook_point = hook_point)
),
bound as (
    select o.site, range_lower(o.mean, o.std, tau::double) as lower, range_upper(o.mean, o.std, tau::double) as upper
    from own o
    where o.label = concept
),
mass as (
    select o.site, o.label,
        sum(h.n * part_inside(greatest(h.lower, o.min), least(h.upper, o.max), b.lower, b.upper)) / sum(h.n) as share
    from histograms h
    join own o on o.site = h.hook_point and o.label = h.concept
    join bound b on b.site = o.site
    where h.layer = layer and h.neuron = neuron
    group by o.site, o.label
)
select o.site as hook_point, o.label as of_concept, o.n, least(1, m.share) as share,
    case
        when o.std = 0 then (o.mean between b.lower and b.upper)::double
        else normal_cdf((b.upper - o.mean) / o.std) - normal_cdf((b.lower - o.mean) / o.std)
    end as share_gaussian
from own o
join bound b on b.site = o.site
left join mass m on m.site = o.site and m.label = o.label
order by o.site, (o.label = concept) desc, m.share desc nulls last, o.label;

-- How far do two concepts share a neuron's values? From the histograms and moments, so that it answers for pairs that the store
-- did not keep too. ovl: Inman and Bradley 1989.
create or replace macro ovl(layer, neuron, concept_a, concept_b, hook_point := null) as table
with counts as (
    select h.hook_point as site, h.bin, sum(h.n) filter (h.concept = concept_a) as n_a,
        sum(h.n) filter (h.concept = concept_b) as n_b
    from histograms h
    where h.layer = layer and h.neuron = neuron and h.concept in (concept_a, concept_b)
        and (hook_point is null or h.hook_point = hook_point)
    group by h.hook_point, h.bin
),
share as (
    select c.site, c.n_a / sum(c.n_a) over (partition by c.site) as p_a, c.n_b / sum(c.n_b) over (partition by c.site) as p_b
    from counts c
),
shared as (
    select s.site, sum(least(coalesce(s.p_a, 0), coalesce(s.p_b, 0))) as mass, max(s.p_a) * max(s.p_b) > 0 as has_both
    from share s
    group by s.site
)
select a.hook_point, if(s.has_both, s.mass, null) as ovl, bhattacharyya(a.mean, a.std, b.mean, b.std) as bhattacharyya
from moments a
join moments b on a.hook_point = b.hook_point and a.layer = b.layer and a.neuron = b.neuron
left join shared s on s.site = a.hook_point
where a.layer = layer and a.neuron = neuron and a.concept = concept_a and b.concept = concept_b
    and b.layer = layer and b.neuron = neuron and (hook_point is null or a.hook_point = hook_point)
order by a.hook_point;

-- Any quantile of a neuron under each concept, from the histogram: right within its bin, 1/8 of the value.
create or replace macro quantile_of(layer, neuron, q, hook_point := null) as table
with counts as (
    select h.hook_point as site, h.concept, h.bin, sum(h.n) as n
    from histograms h
    where h.layer = layer and h.neuron = neuron and (hook_point is null or h.hook_point = hook_point)
    group by h.hook_point, h.concept, h.bin
),
running as (
    select c.*, sum(c.n) over (partition by c.site, c.concept order by c.bin) as n_up_to,
        sum(c.n) over (partition by c.site, c.concept) as total
    from counts c
),
place as (
    select r.site, r.concept, min(r.bin) as bin, min_by(r.n, r.bin) as n, min_by(r.n_up_to, r.bin) as n_up_to,
        any_value(r.total) as total
    from running r
    where r.n_up_to >= q * r.total
    group by r.site, r.concept
)
select p.site as hook_point, p.concept, q::double as q,
    greatest(bin_lower(p.bin), m.min) + (q * p.total - p.n_up_to + p.n) / p.n
        * (least(bin_upper(p.bin), m.max) - greatest(bin_lower(p.bin), m.min)) as value
from place p
join moments m on m.hook_point = p.site and m.concept = p.concept
where m.layer = layer and m.neuron = neuron
order by p.site, p.concept;

-- The exact Kolmogorov-Smirnov distance between the values and the Gaussian of their own mean and std, where raw values were kept;
-- of one neuron or of the whole layer. NULL where nothing varies.
create or replace macro ks_exact(layer, neuron := null, hook_point := null) as table
with placed as (
    select v.hook_point as site, v.neuron as j, v.concept, v.value, m.mean, m.std,
        row_number() over (partition by v.hook_point, v.neuron, v.concept order by v.value) as i,
        count(*) over (partition by v.hook_point, v.neuron, v.concept) as n
    from activations v
    join moments m on m.hook_point = v.hook_point and m.layer = v.layer and m.neuron = v.neuron and m.concept = v.concept
    where v.layer = layer and m.layer = layer and (neuron is null or v.neuron = neuron) and (neuron is null or m.neuron = neuron)
        and (hook_point is null or v.hook_point = hook_point) and isfinite(v.value)
),
expected as (
    select p.site, p.j, p.concept, p.i, p.n, normal_cdf((p.value - p.mean) / nullif(p.std, 0)) as p from placed p
)
select e.site as hook_point, e.j as neuron, e.concept, max(e.n) as n,
    max(if(e.p is null, null, greatest(e.i / e.n - e.p, e.p - (e.i - 1) / e.n))) as ks
from expected e
group by e.site, e.j, e.concept
order by e.site, e.j, e.concept;

-- Everything about one neuron, a row per concept: its values, its range, how Gaussian they are, how salient the neuron is, and with
-- which other concept it is confused most.
create or replace macro neuron_card(layer, neuron, tau := 2.5, hook_point := null) as table
with own as (
    select m.hook_point as site, m.concept as label, m.*
    from moments m
    where m.layer = layer and m.neuron = neuron and (hook_point is null or m.hook_point = hook_point)
),
shape as (
    select d.hook_point as site, d.concept as label, d.ks, d.p05, d.p50, d.p95
    from distributions d
    where d.layer = layer and d.neuron = neuron
),
pair as (
    select o.hook_point as site, o.concept_a, o.concept_b, coalesce(o.ovl, o.ovl_gaussian) as shared
    from overlap o
    where o.layer = layer and o.neuron = neuron
),
other as (
    select p.site, p.concept_a as label, p.concept_b as other, p.shared from pair p
    union all
    select p.site, p.concept_b, p.concept_a, p.shared from pair p
),
confused as (
    select o.site, o.label, avg(o.shared) as mean_ovl, max(o.shared) as nearest_ovl, arg_max(o.other, o.shared) as nearest
    from other o
    group by o.site, o.label
),
ranked as (
    select s.hook_point as site, s.concept as label, s.rank
    from salience s
    where s.method = 'mean_abs' and s.layer = layer and s.neuron = neuron
)
select o.site as hook_point, o.label as concept, o.n, o.mean, o.std, range_lower(o.mean, o.std, tau::double) as lower,
    range_upper(o.mean, o.std, tau::double) as upper, o.min, h.p05, h.p50, h.p95, o.max, o.mean_abs, o.skewness, o.kurtosis, h.ks,
    r.rank, c.mean_ovl, c.nearest, c.nearest_ovl
from own o
left join shape h using (site, label)
left join confused c using (site, label)
left join ranked r using (site, label)
order by o.site, o.label;
