-- How much of every concept has been collected?
-- in: shards      out: one row per concept: shards, samples and tokens planned and committed, and the shards still missing
select concept, count(*) as n_shards, count_if(committed)::bigint as n_committed,
    sum(n_samples)::bigint as n_samples, coalesce(sum(n_samples) filter (committed), 0)::bigint as n_samples_committed,
    sum(n_tokens)::bigint as n_tokens, coalesce(sum(n_tokens) filter (committed), 0)::bigint as n_tokens_committed,
    coalesce(list(shard order by shard) filter (not committed), []) as missing
from shards
group by concept
order by concept;
