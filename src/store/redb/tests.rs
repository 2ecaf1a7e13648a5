//! What is true of the durable store alone: crashes, full disks, damaged files.

mod beside;
mod crash;
mod damage;
mod disk;
#[cfg(feature = "cli")]
mod salvage;
