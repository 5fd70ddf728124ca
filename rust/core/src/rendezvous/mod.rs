//! How the agents of a job find each other, round after round.
//!
//! [`rounds`] decides for all of them, on the node that hosts the store, and leaves to `seating` who takes part; [`member`] decides for
//! one. [`message`] is what they say to each other, [`stranger`] what is said to agents of torch. The threads that carry it out are those
//! of [`crate::store::server`] and of `talker`, which [`client`] starts.

pub mod client;
pub mod member;
pub mod message;
pub mod rounds;
mod seating;
pub mod stranger;
mod talker;

pub use client::Client;
