-- Which hook points, layers and concepts do two stores hold, and with how many neurons?
-- in: moments (store A), moments_b (store B)      out: one row per hook point, layer and concept of either store
-- A width is NULL where its store holds nothing of that hook point, layer and concept.
with a as (
    select hook_point, layer, concept, count(*) as width from moments group by all
),
b as (
    select hook_point, layer, concept, count(*) as width from moments_b group by all
)
select hook_point, layer, concept, a.width as width_a, b.width as width_b
from a full join b using (hook_point, layer, concept)
order by hook_point, layer, concept;
