//! The decisions of `logic`, and the applier of a replica, in a simulated world: see CONTRIBUTING.md.

pub(crate) mod records;
