#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| language_model_fuzz::fuzzed::gguf(bytes));
