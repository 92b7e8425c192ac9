-- Which mean and spread would each neuron have under each concept if the texts' labels were shuffled?
-- in: activations, $hook_point, $layer, $seed      out: hook_point, layer, neuron, concept, n, mean, std, one row per neuron and concept
-- Every text keeps all its values and gets the concept of another: the texts in the order of a hash take the concepts of the
-- texts in their own order, so each concept keeps its number of texts. The same seed shuffles all layers alike.
with text as (
    select sample, any_value(concept) as concept
    from activations
    where hook_point = $hook_point and layer = $layer
    group by sample
),
shuffled as (
    select drawn.sample, given.concept
    from (select sample, row_number() over (order by md5(concat($seed::varchar, ' ', sample)), sample) as place from text) drawn
    join (select concept, row_number() over (order by sample) as place from text) given using (place)
),
value as (
    select a.neuron, s.concept, a.value::double as x
    from activations a join shuffled s using (sample)
    where a.hook_point = $hook_point and a.layer = $layer and isfinite(a.value)
),
centre as (
    select neuron, concept, count(*) as n, avg(x) as mean from value group by all
)
select $hook_point::varchar as hook_point, $layer::smallint as layer, neuron, concept, any_value(c.n) as n, any_value(c.mean) as mean,
    sqrt(avg((x - c.mean) * (x - c.mean))) as std
from value join centre c using (neuron, concept)
group by neuron, concept
order by neuron, concept;
