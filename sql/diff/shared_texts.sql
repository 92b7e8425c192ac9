-- How many texts of store A stand in store B too, under the same concept?
-- in: samples (store A), samples_b (store B)      out: one row: n_a, n_b, n_shared (of A's texts)
-- A text that stands in both moves the numbers of both together: a z that takes the stores as independent is then too small.
select (select count(*) from samples) as n_a, (select count(*) from samples_b) as n_b,
    (select count(*) from samples semi join samples_b using (concept, text)) as n_shared;
