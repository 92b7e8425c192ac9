-- In which layer do neurons keep concepts apart?
-- in: overlap_by_layer      out: one row per hook point and layer; mean_ovl is the mean over neurons of a pair's overlap, given for
--     the mean of all pairs, for the pair that overlaps least and for the pair that overlaps most
select hook_point, layer, count(*) as n_pairs, sum(n_dropped)::bigint as n_dropped, avg(mean_ovl) as mean_ovl,
    min(mean_ovl) as lowest_ovl, arg_min(concept_a, mean_ovl) as lowest_a, arg_min(concept_b, mean_ovl) as lowest_b,
    max(mean_ovl) as highest_ovl, arg_max(concept_a, mean_ovl) as highest_a, arg_max(concept_b, mean_ovl) as highest_b,
    avg(share_below_half) as share_below_half
from overlap_by_layer
group by hook_point, layer
order by hook_point, layer;
