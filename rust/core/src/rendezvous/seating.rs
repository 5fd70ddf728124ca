//! Selects the nodes of a round and assigns their ranks. Pure.

use std::collections::HashMap;
use std::time::Instant;

use super::message::{Cause, Introduction, Join, Place};

/// Identifies the connection of an agent. Later connections have larger numbers.
pub type Id = u64;

/// An agent that waits for a round.
pub(super) struct Candidate<'a> {
    pub(super) id: Id,
    pub(super) agent: &'a Introduction,
    pub(super) join: &'a Join,
    pub(super) since: Instant,
    /// Its rank in the last round, if it took part in that.
    pub(super) former_rank: Option<u64>,
}

/// The part of a [`Place`] that is the same for all nodes of the round.
pub(super) struct Round {
    pub(super) number: u64,
    pub(super) address: Option<String>,
    pub(super) failures: u64,
    pub(super) restarts_used: u64,
    pub(super) membership_changes: u64,
    pub(super) cause: Option<Cause>,
}

/// Picks the nodes of the round, in the order of their ranks.
pub(super) fn choose(mut waiting: Vec<Candidate<'_>>, max_nodes: usize) -> Vec<Candidate<'_>> {
    // The host's own agent always takes part: the store is at the address of rank 0.
    waiting.sort_by_key(|candidate| {
        (!candidate.agent.is_host, candidate.former_rank.is_none(), candidate.since, candidate.id)
    });
    waiting.truncate(max_nodes);
    waiting.sort_by_key(|candidate| {
        let former_rank = candidate.former_rank.unwrap_or(u64::MAX);
        (candidate.agent.node_rank, !candidate.agent.is_host, former_rank, candidate.agent.name.clone(), candidate.id)
    });
    waiting
}

/// The places of the chosen nodes. Ranks of workers follow the order of the nodes, both in the world and within each role.
pub(super) fn places(chosen: &[Candidate<'_>], round: &Round) -> Vec<(Id, Place)> {
    let mut role_sizes: HashMap<&str, u64> = HashMap::new();
    for candidate in chosen {
        *role_sizes.entry(&candidate.join.role).or_default() += candidate.join.local_world_size;
    }
    let world_size = role_sizes.values().sum();
    let mut first_rank = 0;
    let mut first_role_ranks: HashMap<&str, u64> = HashMap::new();
    let mut places = Vec::with_capacity(chosen.len());
    for (group_rank, candidate) in (0..).zip(chosen) {
        let first_role_rank = first_role_ranks.entry(&candidate.join.role).or_default();
        let place = Place {
            round: round.number,
            group_rank,
            group_world_size: u64::try_from(chosen.len()).unwrap_or(u64::MAX),
            first_rank,
            world_size,
            first_role_rank: *first_role_rank,
            role_world_size: role_sizes[candidate.join.role.as_str()],
            address: round.address.clone(),
            failures: round.failures,
            restarts_used: round.restarts_used,
            membership_changes: round.membership_changes,
            cause: round.cause.clone(),
        };
        first_rank += candidate.join.local_world_size;
        *first_role_rank += candidate.join.local_world_size;
        places.push((candidate.id, place));
    }
    places
}
