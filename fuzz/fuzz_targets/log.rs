#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let found = ruvector_cluster::fuzzing::TARGETS.iter().find(|(name, _)| *name == "log");
    found.expect("a target of this name").1(bytes);
});
