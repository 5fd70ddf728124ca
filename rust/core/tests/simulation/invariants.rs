//! What holds whenever a round begins.

use ferroelastic_core::rendezvous::message::Place;

use super::{Job, Work};

impl Job {
    /// A round begins: whoever the host knows has no workers of another one.
    pub(super) fn check_that_nobody_runs(&self) {
        for (link, index) in &self.links {
            let agent = &self.agents[*index];
            let runs = matches!(agent.work, Work::Running(_) | Work::Stopping { .. });
            assert!(
                !(runs && agent.is_alive && agent.link == Some(*link)),
                "{} still runs {:?}",
                agent.name,
                agent.work
            );
        }
    }

    /// A round has begun: it has as many nodes as it may, and all were told the same, each with ranks of its own.
    pub(super) fn check_places(&self, places: &[Place]) {
        let size = places.len();
        let (least, most) = (self.min_nodes as usize, self.max_nodes as usize);
        assert!((least..=most).contains(&size), "a round of {size} nodes");
        for (rank, place) in (0u64..).zip(places) {
            assert_eq!((place.group_rank, place.group_world_size), (rank, size as u64));
            assert_eq!((place.first_rank, place.world_size), (2 * rank, 2 * size as u64));
            assert_eq!((place.first_role_rank, place.role_world_size), (2 * rank, 2 * size as u64));
            let same = |place: &Place| (place.round, place.failures, place.membership_changes, place.cause.clone());
            assert_eq!(same(place), same(&places[0]));
        }
    }

    /// A silent agent is taken for lost, and others may have its ranks: its workers have been ended, by itself or by its guard, which reads
    /// the lease also while the agent is suspended.
    pub(super) fn check_that_its_workers_are_gone(&self, link: u64) {
        let Some(index) = self.links.get(&link) else { return };
        let agent = &self.agents[*index];
        let runs = matches!(agent.work, Work::Running(_) | Work::Stopping { .. });
        let may_run = agent.member.lease().is_some_and(|lease| self.now < lease.kill_at);
        assert!(
            !(runs && may_run && agent.is_alive && agent.link == Some(link)),
            "{} is lost, and its workers may run: {:?}",
            agent.name,
            agent.member.lease()
        );
    }
}

/// The failure of a worker in these jobs, and its explanation.
pub(super) const FAILURE: &str = "rank 0 exited with 1";
pub(super) const DETAIL: &str = r#"{"rank":0}"#;

/// An agent has heard the end of the job: with the explanation if a worker's failure ended it.
pub(super) fn check_end(text: &str, detail: &str) {
    assert_eq!(detail, if text.starts_with(FAILURE) { DETAIL } else { "" }, "{text}");
}
