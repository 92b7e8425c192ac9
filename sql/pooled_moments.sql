-- Which mean and spread does each neuron have over all concepts together?
-- in: moments, $hook_point, $layer      out: hook_point, layer, neuron, concept, n, mean, std; the same for every concept of a neuron
-- What shuffled labels tend to, as texts become many, where the concepts are about equally large. With d the distance of a
-- concept's mean from that of all: std^2 = sum(n (std_c^2 + d^2)) / sum(n).
with pooled as (
    select neuron, sum(n)::bigint as n, sum(n * mean) / sum(n) as mean
    from moments
    where hook_point = $hook_point and layer = $layer and n > 0
    group by neuron
),
spread as (
    select m.neuron, any_value(p.n) as n, any_value(p.mean) as mean,
        sqrt(sum(m.n * (m.std * m.std + (m.mean - p.mean) * (m.mean - p.mean))) / any_value(p.n)) as std
    from moments m join pooled p using (neuron)
    where m.hook_point = $hook_point and m.layer = $layer and m.n > 0
    group by m.neuron
)
select $hook_point::varchar as hook_point, $layer::smallint as layer, neuron, m.concept, s.n, s.mean, s.std
from spread s join moments m using (neuron)
where m.hook_point = $hook_point and m.layer = $layer
order by neuron, m.concept;
