//! Who takes part in a round that begins, and with which ranks. Pure.

use std::collections::HashMap;
use std::time::Instant;

use super::message::{Cause, Introduction, Join, Place};

/// Identifies the connection of an agent. Later connections have larger numbers.
pub type Id = u64;

/// An agent that waits for a round.
pub(super) struct Candidate<'a> {
    pub(super) id: Id,
    pub(super) who: &'a Introduction,
    pub(super) join: &'a Join,
    pub(super) since: Instant,
    /// Its rank in the last round, if it took part.
    pub(super) former: Option<u64>,
}

/// What all who take part are told alike.
pub(super) struct Round {
    pub(super) number: u64,
    pub(super) address: Option<String>,
    pub(super) failures: u64,
    pub(super) membership_changes: u64,
    pub(super) cause: Option<Cause>,
}

/// Picks those who take part. They come in the order of their ranks.
pub(super) fn choose(mut waiting: Vec<Candidate<'_>>, most: usize) -> Vec<Candidate<'_>> {
    // The host's own agent has its place in any case: the store is at the address of rank 0.
    waiting.sort_by_key(|one| (!one.who.is_host, one.former.is_none(), one.since, one.id));
    waiting.truncate(most);
    waiting.sort_by_key(|one| {
        let former = one.former.unwrap_or(u64::MAX);
        (one.who.node_rank, !one.who.is_host, former, one.who.name.clone(), one.id)
    });
    waiting
}

/// The place of each. Workers have ranks in the order of their nodes, among all and among those of their role.
pub(super) fn places(seated: &[Candidate<'_>], round: &Round) -> Vec<(Id, Place)> {
    let mut role_sizes: HashMap<&str, u64> = HashMap::new();
    for one in seated {
        *role_sizes.entry(&one.join.role).or_default() += one.join.local_world_size;
    }
    let world_size = role_sizes.values().sum();
    let mut first_rank = 0;
    let mut first_role_ranks: HashMap<&str, u64> = HashMap::new();
    let mut places = Vec::with_capacity(seated.len());
    for (group_rank, one) in (0..).zip(seated) {
        let first_role_rank = first_role_ranks.entry(&one.join.role).or_default();
        let place = Place {
            round: round.number,
            group_rank,
            group_world_size: u64::try_from(seated.len()).unwrap_or(u64::MAX),
            first_rank,
            world_size,
            first_role_rank: *first_role_rank,
            role_world_size: role_sizes[one.join.role.as_str()],
            address: round.address.clone(),
            failures: round.failures,
            membership_changes: round.membership_changes,
            cause: round.cause.clone(),
        };
        first_rank += one.join.local_world_size;
        *first_role_rank += one.join.local_world_size;
        places.push((one.id, place));
    }
    places
}
