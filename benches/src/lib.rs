//! Benchmarks of Sendense. The criterion groups lie in `benches/`, the end-to-end comparison in `compare/`; this
//! library is empty on purpose.
