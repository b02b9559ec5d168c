-- Oldest program: 1
-- The version of the program that a node runs; empty for a program that does not know this file.
ALTER TABLE nodes ADD COLUMN version TEXT NOT NULL DEFAULT '';
