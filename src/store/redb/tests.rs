//! What is true of the durable store alone: crashes, full disks, damaged files.

mod crash;
mod damage;
mod disk;
