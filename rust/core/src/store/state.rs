//! What a store holds, and what each request does to it. Pure: requests in, replies out.
//!
//! The semantics are those of torch's libuv server, its oddities included, for clients see them.

use std::collections::{HashMap, VecDeque};

use super::wire::{Key, Limits, StoreRequest, Value};

/// A connection, by a number of the caller's.
pub type Peer = u64;

const READY: u8 = 0;
const NOT_READY: u8 = 1;
const STOP_WAITING: u8 = 0;
const WAIT_CANCELED: u8 = 1;

/// What a connection is told. Replies of a connection are in order; other than the answer to a `WAIT`, each comes at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreReply {
    /// To whom.
    pub peer: Peer,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// A request that torch's server answers by closing the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misuse {
    /// `ADD` to something that is no number.
    #[error("the value of key {0} is no number")]
    NotANumber(String),
    /// The answer is larger than [`Limits::reply_bytes`].
    #[error("a reply of {size} bytes is over the limit of {limit}")]
    TooMuch {
        /// What it would have.
        size: usize,
        /// What it may have.
        limit: u64,
    },
}

/// What a connection waits for.
#[derive(Debug)]
struct Waiting {
    /// How many keys are missing, each counted as often as it was named.
    missing: usize,
    /// Those keys, each once.
    keys: Vec<Key>,
}

/// The contents of a store.
#[derive(Debug)]
pub struct StoreState {
    most_replied: u64,
    values: HashMap<Key, Value>,
    queues: HashMap<Key, VecDeque<Value>>,
    waiting: HashMap<Peer, Waiting>,
    /// By key, who waits for it, in the order in which they came; also who is at the barrier of that name.
    waiters: HashMap<Key, Vec<Peer>>,
    replies: Vec<StoreReply>,
}

impl Default for StoreState {
    fn default() -> Self {
        Self::new(&Limits::default())
    }
}

impl StoreState {
    /// A store without a key.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        Self {
            most_replied: limits.reply_bytes,
            values: HashMap::new(),
            queues: HashMap::new(),
            waiting: HashMap::new(),
            waiters: HashMap::new(),
            replies: Vec::new(),
        }
    }

    /// Does what a connection asks for; the replies that follow from it, also to others, are appended to `replies`.
    pub fn apply(&mut self, peer: Peer, request: StoreRequest, replies: &mut Vec<StoreReply>) -> Result<(), Misuse> {
        let answered = self.dispatch(peer, request);
        replies.append(&mut self.replies);
        answered
    }

    /// A connection has ended: it waits for nothing any more. The counters of barriers that it has entered stay.
    pub fn forget(&mut self, peer: Peer) {
        let Some(waiting) = self.waiting.remove(&peer) else { return };
        for key in waiting.keys {
            if let Some(peers) = self.waiters.get_mut(&key) {
                peers.retain(|other| *other != peer);
                if peers.is_empty() {
                    self.waiters.remove(&key);
                }
            }
        }
    }

    /// The value of a key, for those on this side of the wire.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<&Value> {
        self.values.get(key)
    }

    /// How many keys there are, without queues.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there is no key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    fn dispatch(&mut self, peer: Peer, request: StoreRequest) -> Result<(), Misuse> {
        match request {
            StoreRequest::Set { key, value } => self.set(key, value),
            StoreRequest::CompareSet { key, expected, desired } => self.compare_set(peer, &key, &expected, desired)?,
            StoreRequest::Get { key } => {
                let value = self.values.get(&key).map_or(&[][..], Vec::as_slice);
                self.allow(sized_len(value))?;
                let reply = sized(value);
                self.reply(peer, reply);
            }
            StoreRequest::Add { key, delta } => {
                let sum = self.add(&key, delta)?;
                self.reply(peer, sum.to_le_bytes().to_vec());
                self.wake(&key);
            }
            StoreRequest::Check { keys } => {
                let ready = keys.iter().all(|key| self.is_present(key));
                self.reply(peer, vec![if ready { READY } else { NOT_READY }]);
            }
            StoreRequest::Wait { keys } => self.wait(peer, keys),
            StoreRequest::GetNumKeys => self.reply(peer, count(self.values.len())),
            StoreRequest::DeleteKey { key } => {
                let existed = self.values.remove(&key).is_some();
                self.reply(peer, i64::from(existed).to_le_bytes().to_vec());
            }
            StoreRequest::Append { key, value } => {
                self.wake(&key);
                self.values.entry(key).or_default().extend_from_slice(&value);
            }
            StoreRequest::MultiGet { keys } => {
                let values = || keys.iter().map(|key| self.values.get(key).map_or(&[][..], Vec::as_slice));
                let size = values().map(sized_len).fold(0, usize::saturating_add);
                self.allow(size)?;
                let mut reply = Vec::with_capacity(size);
                values().for_each(|value| push_sized(&mut reply, value));
                self.reply(peer, reply);
            }
            StoreRequest::MultiSet { pairs } => pairs.into_iter().for_each(|(key, value)| self.set(key, value)),
            StoreRequest::CancelWait => {
                self.forget(peer);
                self.reply(peer, vec![WAIT_CANCELED]);
            }
            StoreRequest::Ping { nonce } => self.reply(peer, nonce.to_le_bytes().to_vec()),
            StoreRequest::QueuePush { key, value } => {
                self.queues.entry(key.clone()).or_default().push_back(value);
                self.wake_one(&key);
            }
            StoreRequest::QueuePop { key } => self.queue_pop(peer, &key)?,
            StoreRequest::QueueLen { key } => self.reply(peer, count(self.queues.get(&key).map_or(0, VecDeque::len))),
            StoreRequest::ListKeys => {
                let mut reply = count(self.values.len());
                let sizes = self.values.keys().map(|key| sized_len(key));
                let size = sizes.fold(reply.len(), usize::saturating_add);
                self.allow(size)?;
                reply.reserve_exact(size - reply.len());
                self.values.keys().for_each(|key| push_sized(&mut reply, key));
                self.reply(peer, reply);
            }
            StoreRequest::Barrier { key, world_size } => self.barrier(peer, key, world_size)?,
            // Not for the store: the server has seen to it.
            StoreRequest::Upgrade => {}
        }
        Ok(())
    }

    fn set(&mut self, key: Key, value: Value) {
        self.wake(&key);
        self.values.insert(key, value);
    }

    /// A missing key is taken for empty when that is expected. Otherwise the peer is told what it expects to be told, as if it were there.
    fn compare_set(&mut self, peer: Peer, key: &Key, expected: &[u8], desired: Value) -> Result<(), Misuse> {
        let current = self.values.get(key).map(Vec::as_slice);
        let is_expected = current.unwrap_or_default() == expected;
        let reply = if is_expected { &desired } else { current.unwrap_or(expected) };
        self.allow(sized_len(reply))?;
        let reply = sized(reply);
        if is_expected {
            self.values.insert(key.clone(), desired);
        }
        self.reply(peer, reply);
        self.wake(key);
        Ok(())
    }

    fn add(&mut self, key: &Key, delta: i64) -> Result<i64, Misuse> {
        let current = match self.values.get(key) {
            None => 0,
            Some(value) => {
                number(value).ok_or_else(|| Misuse::NotANumber(String::from_utf8_lossy(key).into_owned()))?
            }
        };
        let sum = current.wrapping_add(delta);
        self.values.insert(key.clone(), sum.to_string().into_bytes());
        Ok(sum)
    }

    fn is_present(&self, key: &Key) -> bool {
        // A queue is there as long as it holds something.
        self.values.contains_key(key) || self.queues.contains_key(key)
    }

    fn wait(&mut self, peer: Peer, keys: Vec<Key>) {
        self.forget(peer);
        let missing: Vec<Key> = keys.into_iter().filter(|key| !self.is_present(key)).collect();
        if missing.is_empty() {
            self.reply(peer, vec![STOP_WAITING]);
            return;
        }
        self.register(peer, missing);
    }

    fn register(&mut self, peer: Peer, mut keys: Vec<Key>) {
        for key in &keys {
            self.waiters.entry(key.clone()).or_default().push(peer);
        }
        let missing = keys.len();
        // When the peer gives up, each list of waiters is gone through once, however often the key was named.
        keys.sort_unstable();
        keys.dedup();
        self.waiting.insert(peer, Waiting { missing, keys });
    }

    /// A key is there: whoever waits for nothing else may go on.
    fn wake(&mut self, key: &Key) {
        for peer in self.waiters.remove(key).unwrap_or_default() {
            self.found(peer);
        }
    }

    /// What was pushed is for one of those who wait: the first who may go on now. Who waits for more than this would leave it there.
    fn wake_one(&mut self, key: &Key) {
        let Some(mut peers) = self.waiters.remove(key) else { return };
        let goes_on = peers.iter().position(|peer| self.found(*peer));
        peers.drain(..goes_on.map_or(peers.len(), |first| first + 1));
        if !peers.is_empty() {
            self.waiters.insert(key.clone(), peers);
        }
    }

    /// A key that a connection waits for is there; whether it has waited for nothing else and was told.
    fn found(&mut self, peer: Peer) -> bool {
        let Some(waiting) = self.waiting.get_mut(&peer) else { return false };
        waiting.missing -= 1;
        let is_all = waiting.missing == 0;
        if is_all {
            self.forget(peer);
            self.reply(peer, vec![STOP_WAITING]);
        }
        is_all
    }

    fn queue_pop(&mut self, peer: Peer, key: &Key) -> Result<(), Misuse> {
        let front = self.queues.get(key).and_then(VecDeque::front);
        self.allow(size_of::<i64>() + front.map_or(0, |value| sized_len(value)))?;
        let mut reply = count(self.queues.get(key).map_or(0, VecDeque::len));
        if let Some(queue) = self.queues.get_mut(key) {
            if let Some(value) = queue.pop_front() {
                push_sized(&mut reply, &value);
            }
            if queue.is_empty() {
                self.queues.remove(key);
            }
        }
        self.reply(peer, reply);
        Ok(())
    }

    /// Who enters waits for the key, which is there as a counter, until the barrier is full or somebody else sets it.
    fn barrier(&mut self, peer: Peer, key: Key, world_size: i64) -> Result<(), Misuse> {
        self.forget(peer);
        if self.add(&key, 1)? < world_size {
            self.register(peer, vec![key]);
        } else {
            self.reply(peer, vec![STOP_WAITING]);
            self.wake(&key);
        }
        Ok(())
    }

    /// Refuses a reply that is too large, before there is one.
    fn allow(&self, size: usize) -> Result<(), Misuse> {
        let limit = self.most_replied;
        if u64::try_from(size).is_ok_and(|size| size <= limit) { Ok(()) } else { Err(Misuse::TooMuch { size, limit }) }
    }

    fn reply(&mut self, peer: Peer, bytes: Vec<u8>) {
        self.replies.push(StoreReply { peer, bytes });
    }
}

/// What bytes take after their length.
fn sized_len(bytes: &[u8]) -> usize {
    size_of::<u64>().saturating_add(bytes.len())
}

/// Bytes after their length.
fn sized(bytes: &[u8]) -> Vec<u8> {
    let mut sized = Vec::with_capacity(sized_len(bytes));
    push_sized(&mut sized, bytes);
    sized
}

fn push_sized(to: &mut Vec<u8>, bytes: &[u8]) {
    to.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    to.extend_from_slice(bytes);
}

fn count(count: usize) -> Vec<u8> {
    i64::try_from(count).unwrap_or(i64::MAX).to_le_bytes().to_vec()
}

/// As `stoll(3)` reads it: after white space and a sign, as many digits as there are. `None` without a digit, or if it does not fit.
fn number(text: &[u8]) -> Option<i64> {
    // Rust's white space is without the vertical tab.
    let start = text.iter().position(|byte| !matches!(byte, b'\t'..=b'\r' | b' '))?;
    let text = &text[start..];
    let (sign, digits) = match text.split_first()? {
        (b'-', rest) => (-1, rest),
        (b'+', rest) => (1, rest),
        _ => (1, text),
    };
    let end = digits.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(digits.len());
    let mut value: Option<i64> = None;
    for digit in &digits[..end] {
        let digit = i64::from(digit - b'0') * sign;
        value = Some(value.unwrap_or(0).checked_mul(10)?.checked_add(digit)?);
    }
    value
}
