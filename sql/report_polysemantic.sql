-- For how many concepts is a neuron salient, layer by layer?
-- in: polysemantic, moments      out: one row per hook point, layer and number of concepts: how many neurons are salient for so many
with width as (
    select hook_point, layer, max(neuron) + 1 as width from moments group by hook_point, layer
),
counted as (
    select hook_point, layer, n_concepts, count(*) as n_neurons from polysemantic group by hook_point, layer, n_concepts
),
none as (
    select w.hook_point, w.layer, 0 as n_concepts, any_value(w.width) - coalesce(sum(c.n_neurons), 0)::bigint as n_neurons
    from width w left join counted c using (hook_point, layer)
    group by w.hook_point, w.layer
)
select hook_point, layer, n_concepts, n_neurons from counted
union all
select hook_point, layer, n_concepts, n_neurons from none where n_neurons > 0
order by hook_point, layer, n_concepts;
