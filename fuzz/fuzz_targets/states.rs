#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dijiang_fuzz::fuzzed::states::states(bytes));
