//! How the agents of a job find each other, round after round. Pure: events in, actions out.
//!
//! [`rounds`] decides for all agents, on the node that hosts the job, and leaves ranks to `seating`. [`member`] decides for one agent.
//! [`message`] has the messages between them. Two threads carry out the actions: [`crate::host`] and [`crate::membership`].

pub mod member;
pub mod message;
pub mod rounds;
mod seating;
