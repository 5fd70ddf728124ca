//! The contents of a store, and the effect of each request. Pure: requests in, replies out.
//!
//! The semantics are those of torch's libuv server, including its oddities, because clients depend on them.

use std::collections::{HashMap, VecDeque};

use super::wire::{Key, Limits, StoreRequest, Value};

/// A connection, as numbered by the caller.
pub type Peer = u64;

const READY: u8 = 0;
const NOT_READY: u8 = 1;
const STOP_WAITING: u8 = 0;
const WAIT_CANCELED: u8 = 1;

/// A reply to a connection. Replies to one connection are in order. All come at once, except for the answers to `WAIT` and `BARRIER`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreReply {
    /// The connection to reply to.
    pub peer: Peer,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// A request that torch's server answers by closing the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misuse {
    /// `ADD` to a value that is not a number.
    #[error("the value of key {0} is not a number")]
    NotANumber(String),
    /// The reply exceeds [`Limits::reply_bytes`].
    #[error("a reply of {size} bytes is over the limit of {limit}")]
    ReplyTooLarge {
        /// Size of the reply.
        size: usize,
        /// The limit.
        limit: u64,
    },
}

/// The keys that a connection waits for.
#[derive(Debug)]
struct Waiting {
    /// Number of missing keys, where a key that was named twice counts twice.
    missing: usize,
    /// The missing keys, each once.
    keys: Vec<Key>,
}

/// The contents of a store.
#[derive(Debug)]
pub struct StoreState {
    max_reply_bytes: u64,
    values: HashMap<Key, Value>,
    queues: HashMap<Key, VecDeque<Value>>,
    waiting: HashMap<Peer, Waiting>,
    /// The waiters of each key in the order of their arrival, including those at a barrier with this name.
    waiters: HashMap<Key, Vec<Peer>>,
    replies: Vec<StoreReply>,
}

impl Default for StoreState {
    fn default() -> Self {
        Self::new(&Limits::default())
    }
}

impl StoreState {
    /// An empty store.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        Self {
            max_reply_bytes: limits.reply_bytes,
            values: HashMap::new(),
            queues: HashMap::new(),
            waiting: HashMap::new(),
            waiters: HashMap::new(),
            replies: Vec::new(),
        }
    }

    /// Applies a request. Appends the replies that follow from it, also those to other connections, to `replies`.
    pub fn apply(&mut self, peer: Peer, request: StoreRequest, replies: &mut Vec<StoreReply>) -> Result<(), Misuse> {
        let answered = self.dispatch(peer, request);
        replies.append(&mut self.replies);
        answered
    }

    /// A connection has ended: removes it from all lists of waiters. The counters of the barriers that it has entered stay.
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

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<&Value> {
        self.values.get(key)
    }

    /// Number of keys, without queues.
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
                self.check_reply_size(prefixed_size(value))?;
                let reply = prefixed(value);
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
            StoreRequest::GetNumKeys => self.reply(peer, encode_count(self.values.len())),
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
                let size = values().map(prefixed_size).fold(0, usize::saturating_add);
                self.check_reply_size(size)?;
                let mut reply = Vec::with_capacity(size);
                values().for_each(|value| push_prefixed(&mut reply, value));
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
            StoreRequest::QueueLen { key } => {
                self.reply(peer, encode_count(self.queues.get(&key).map_or(0, VecDeque::len)));
            }
            StoreRequest::ListKeys => {
                let mut reply = encode_count(self.values.len());
                let sizes = self.values.keys().map(|key| prefixed_size(key));
                let size = sizes.fold(reply.len(), usize::saturating_add);
                self.check_reply_size(size)?;
                reply.reserve_exact(size - reply.len());
                self.values.keys().for_each(|key| push_prefixed(&mut reply, key));
                self.reply(peer, reply);
            }
            StoreRequest::Barrier { key, world_size } => self.barrier(peer, key, world_size)?,
            // Handled by the server.
            StoreRequest::Upgrade => {}
        }
        Ok(())
    }

    fn set(&mut self, key: Key, value: Value) {
        self.wake(&key);
        self.values.insert(key, value);
    }

    /// A missing key matches an empty expected value. Otherwise a missing key echoes the expected value, as torch's server does.
    fn compare_set(&mut self, peer: Peer, key: &Key, expected: &[u8], desired: Value) -> Result<(), Misuse> {
        let current = self.values.get(key).map(Vec::as_slice);
        let is_expected = current.unwrap_or_default() == expected;
        let reply = if is_expected { &desired } else { current.unwrap_or(expected) };
        self.check_reply_size(prefixed_size(reply))?;
        let reply = prefixed(reply);
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
                parse_integer(value).ok_or_else(|| Misuse::NotANumber(String::from_utf8_lossy(key).into_owned()))?
            }
        };
        let sum = current.wrapping_add(delta);
        self.values.insert(key.clone(), sum.to_string().into_bytes());
        Ok(sum)
    }

    fn is_present(&self, key: &Key) -> bool {
        // A queue is present while it is not empty.
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
        // With each key once, a peer that stops waiting is removed from each list in one pass.
        keys.sort_unstable();
        keys.dedup();
        self.waiting.insert(peer, Waiting { missing, keys });
    }

    /// A key is present: wakes all waiters that need no other key.
    fn wake(&mut self, key: &Key) {
        for peer in self.waiters.remove(key).unwrap_or_default() {
            self.note_present(peer);
        }
    }

    /// Wakes the first waiter that needs no key but this one, because a pushed value is for one waiter. Waiters that need further keys keep
    /// waiting.
    fn wake_one(&mut self, key: &Key) {
        let Some(mut peers) = self.waiters.remove(key) else { return };
        let woken = peers.iter().position(|peer| self.note_present(*peer));
        peers.drain(..woken.map_or(peers.len(), |first| first + 1));
        if !peers.is_empty() {
            self.waiters.insert(key.clone(), peers);
        }
    }

    /// Notes that a key is present for a waiter. Returns whether it needed no other key and was woken.
    fn note_present(&mut self, peer: Peer) -> bool {
        let Some(waiting) = self.waiting.get_mut(&peer) else { return false };
        waiting.missing -= 1;
        let is_woken = waiting.missing == 0;
        if is_woken {
            self.forget(peer);
            self.reply(peer, vec![STOP_WAITING]);
        }
        is_woken
    }

    fn queue_pop(&mut self, peer: Peer, key: &Key) -> Result<(), Misuse> {
        let front = self.queues.get(key).and_then(VecDeque::front);
        self.check_reply_size(size_of::<i64>() + front.map_or(0, |value| prefixed_size(value)))?;
        let mut reply = encode_count(self.queues.get(key).map_or(0, VecDeque::len));
        if let Some(queue) = self.queues.get_mut(key) {
            if let Some(value) = queue.pop_front() {
                push_prefixed(&mut reply, &value);
            }
            if queue.is_empty() {
                self.queues.remove(key);
            }
        }
        self.reply(peer, reply);
        Ok(())
    }

    /// Counts the peer at the barrier. The peer waits until the count reaches `world_size`, or until another connection sets the key.
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

    /// Refuses a reply that is too large before it is built.
    fn check_reply_size(&self, size: usize) -> Result<(), Misuse> {
        let limit = self.max_reply_bytes;
        if u64::try_from(size).is_ok_and(|size| size <= limit) {
            Ok(())
        } else {
            Err(Misuse::ReplyTooLarge { size, limit })
        }
    }

    fn reply(&mut self, peer: Peer, bytes: Vec<u8>) {
        self.replies.push(StoreReply { peer, bytes });
    }
}

/// Size of a length-prefixed byte string.
fn prefixed_size(bytes: &[u8]) -> usize {
    size_of::<u64>().saturating_add(bytes.len())
}

/// A length-prefixed byte string.
fn prefixed(bytes: &[u8]) -> Vec<u8> {
    let mut prefixed = Vec::with_capacity(prefixed_size(bytes));
    push_prefixed(&mut prefixed, bytes);
    prefixed
}

fn push_prefixed(to: &mut Vec<u8>, bytes: &[u8]) {
    to.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    to.extend_from_slice(bytes);
}

fn encode_count(count: usize) -> Vec<u8> {
    i64::try_from(count).unwrap_or(i64::MAX).to_le_bytes().to_vec()
}

/// Parses like `stoll(3)`: white space, a sign, then digits up to the first other byte. `None` without a digit or on overflow.
fn parse_integer(text: &[u8]) -> Option<i64> {
    // `is_ascii_whitespace` lacks the vertical tab.
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
