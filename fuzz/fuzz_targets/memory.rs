//! Whatever bytes come, reading the memory of an image ends in pages or in an error.
//!
//! From the top of the project: `cargo +nightly fuzz run memory fuzz/corpus/memory fixtures/images/v1-zstd fixtures/corpus`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| snapback::image::fuzz_one(input));
