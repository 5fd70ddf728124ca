//! The rendezvous: how the agents of a job form one round after another. Pure: events in, actions out.
//!
//! [`rounds`] decides for all agents on the node that hosts the job, with the ranks from `seating`. [`member`] decides for one agent.
//! [`policy`] decides whether a failure is followed by a restart. [`message`] defines the messages between them. Two threads carry out the actions: [`crate::host`] and [`crate::membership`].

pub mod member;
pub mod message;
pub mod policy;
pub mod rounds;
mod seating;
