//! Whatever bytes come, reading an image ends in a context or in an error.
//!
//! From the top of the project: `cargo +nightly fuzz run image fuzz/corpus/image fixtures/corpus`. What is found new
//! lands in `fuzz/corpus/image`; what is worth keeping goes to `fixtures/corpus`, which the test suite replays.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| snapback::record::fuzz_one(input));
