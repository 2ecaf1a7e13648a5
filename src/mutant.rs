//! Defects on purpose, to see whether the tests notice them. Only a build with the feature `mutants` has
//! any; there, the environment variable `RUVECTOR_TEST_MUTANT` names those that are on, separated by
//! commas. `tests/mutants.sh` lists and tries them.

/// Whether a defect is on.
#[cfg(not(feature = "mutants"))]
pub(crate) const fn mutant(_name: &str) -> bool {
    false
}

#[cfg(feature = "mutants")]
pub(crate) fn mutant(name: &str) -> bool {
    static ON: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    let on = ON.get_or_init(|| std::env::var("RUVECTOR_TEST_MUTANT").unwrap_or_default());
    on.split(',').any(|one| one == name)
}
