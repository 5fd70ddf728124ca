//! Lets a job run, and says what has become of it.

use std::cmp::Reverse;
use std::time::Duration;

use super::{Job, Work};

impl Job {
    /// The next thing happens. Says whether there was one.
    fn advance(&mut self) -> bool {
        let Some(Reverse((at, number))) = self.queue.pop() else { return false };
        self.now = self.now.max(at);
        let happening = self.happenings.remove(&number).expect("once");
        self.happen(happening);
        true
    }

    /// Runs until nobody is left.
    pub(crate) fn run(&mut self) {
        while self.agents.iter().any(|agent| agent.is_alive) {
            if !self.advance() {
                let alive = self.agents.iter().filter(|agent| agent.is_alive);
                let stuck: Vec<_> = alive.map(|agent| (&agent.member, agent.link)).collect();
                panic!("nothing happens any more: {:?} {:?}", self.ends(), stuck);
            }
            assert!(self.now < self.start + Duration::from_secs(2500), "it does not end: {:?}", self.ends());
        }
    }

    /// Runs until so many rounds have begun, and every agent's workers run.
    pub(crate) fn run_until_all_work(&mut self, rounds: usize) {
        while self.begun.len() < rounds || !self.agents.iter().all(|agent| matches!(agent.work, Work::Running(_))) {
            assert!(self.advance(), "nothing happens any more: {:?}", self.ends());
        }
    }

    /// Workers of an agent fail now.
    pub(crate) fn fail_workers(&mut self, index: usize) {
        self.workers_end(index, self.agents[index].turn, true);
    }

    /// What has become of each agent.
    pub(crate) fn ends(&self) -> Vec<(&str, &Work)> {
        self.agents.iter().map(|agent| (agent.name.as_str(), &agent.work)).collect()
    }

    /// How many agents have ended that way.
    pub(crate) fn count_ended(&self, how: &'static str) -> usize {
        self.agents.iter().filter(|agent| agent.work == Work::Ended(how)).count()
    }

    pub(crate) fn all_ended(&self, how: &'static str) -> bool {
        self.count_ended(how) == self.agents.len()
    }
}
