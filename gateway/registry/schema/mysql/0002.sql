-- Oldest program: 1
-- The version of the program that a node runs; empty for a program that does not know this file.
ALTER TABLE nodes ADD COLUMN version VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT '';
-- The highest generation that a node knows of; 0 for a program that does not know this file.
ALTER TABLE nodes ADD COLUMN max_generation BIGINT UNSIGNED NOT NULL DEFAULT 0;
