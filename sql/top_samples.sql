-- Which texts drive a neuron to its highest and lowest values?
-- in: activations, samples, $hook_point, $layer, $neuron
-- out: the 10 highest and the 10 lowest finite values, highest first, each with its concept, the token's position and the text
-- Empty where the store kept no raw values of that layer or neuron.
with value as (
    select sample, position, concept, value
    from activations
    where hook_point = $hook_point and layer = $layer and neuron = $neuron and isfinite(value)
),
placed as (
    select *, row_number() over (order by value desc, sample, position) as from_top,
        row_number() over (order by value, sample desc, position desc) as from_bottom
    from value
)
select p.value, p.concept, p.sample, p.position, s.text
from placed p left join samples s using (sample)
where p.from_top <= 10 or p.from_bottom <= 10
order by p.value desc, p.sample, p.position;
