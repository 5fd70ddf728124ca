//! The requests of a `TCPStore` client, cut out of the stream in which they come.
//!
//! A request is an opcode and its arguments, without an envelope: its length is known when it has been read. What has been understood of it
//! is kept, so that a request of many keys costs what it holds, however it is fragmented. Integers are little-endian.

/// Opcode by which an agent changes to the rendezvous protocol. No `TCPStore` has it: torch's server closes the connection.
pub const UPGRADE: u8 = 0xFE;

/// The first message of a connection carries this.
pub const MAGIC: u32 = 0x3C85_F7CE;

/// Bounds of what a client may ask for. Beyond them its connection is closed, as torch's server does.
///
/// A connection holds at most one request and one reply of the largest size, and a few MiB. What is stored has no bound, nor have
/// connections: whoever knows the port is taken for one of the job's own workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a key: 8 KiB, as in torch.
    pub key_bytes: u64,
    /// Bytes of a value in a request: 8 MiB, as in torch.
    pub value_bytes: u64,
    /// Keys of a request: 131,072, as in torch.
    pub keys: u64,
    /// Bytes of the keys and values of a request: 256 MiB. Torch's server has no such bound.
    pub request_bytes: u64,
    /// Bytes of the reply to a request: 256 MiB. Torch's server has no such bound. A few bytes can ask for a large value many times over,
    /// and `APPEND` makes values that are larger than a request.
    pub reply_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { key_bytes: 8192, value_bytes: 8 << 20, keys: 131_072, request_bytes: 256 << 20, reply_bytes: 256 << 20 }
    }
}

/// Room for bytes to come, or to be sent, that a connection keeps while there are none: thousands of them may be idle.
const KEPT_ROOM: usize = 1024;

/// A key as it is stored: with the prefixes that clients give it.
pub type Key = Box<[u8]>;
/// A value.
pub type Value = Vec<u8>;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the protocol's")]
pub enum StoreRequest {
    Set {
        key: Key,
        value: Value,
    },
    CompareSet {
        key: Key,
        expected: Value,
        desired: Value,
    },
    Get {
        key: Key,
    },
    Add {
        key: Key,
        delta: i64,
    },
    Check {
        keys: Vec<Key>,
    },
    Wait {
        keys: Vec<Key>,
    },
    GetNumKeys,
    DeleteKey {
        key: Key,
    },
    Append {
        key: Key,
        value: Value,
    },
    MultiGet {
        keys: Vec<Key>,
    },
    MultiSet {
        pairs: Vec<(Key, Value)>,
    },
    CancelWait,
    Ping {
        nonce: u32,
    },
    QueuePush {
        key: Key,
        value: Value,
    },
    QueuePop {
        key: Key,
    },
    QueueLen {
        key: Key,
    },
    ListKeys,
    Barrier {
        key: Key,
        world_size: i64,
    },
    /// Not torch's: what follows is for the rendezvous.
    Upgrade,
}

/// Why a connection is closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The first message is not the one that every client begins with.
    #[error("the peer is no client of a TCPStore: it began with {0:#04x}")]
    NoClient(u8),
    /// It began as a client, with another number than clients have.
    #[error("the peer is no client of a TCPStore: its number is {0:#010x}")]
    Magic(u32),
    /// The opcode is unknown, or came at a wrong time.
    #[error("opcode {0} is not known here")]
    Opcode(u8),
    /// Something is larger than the limits allow.
    #[error("{what} of {size} is over the limit of {limit}")]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// What the peer announced.
        size: u64,
        /// What is allowed.
        limit: u64,
    },
}

/// What has been read of the arguments of a request.
#[derive(Debug, Default)]
struct Partial {
    opcode: u8,
    /// Keys and values in the order in which they come.
    fields: Vec<Vec<u8>>,
    /// How many keys, or pairs, the list has.
    count: Option<u64>,
    /// Bytes that the fields have taken.
    bytes: u64,
}

/// Cuts the stream of one connection into requests.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    is_validated: bool,
    buffer: Vec<u8>,
    /// What of the buffer has been understood.
    used: usize,
    partial: Option<Partial>,
}

pub(crate) mod opcode {
    pub(crate) const VALIDATE: u8 = 0;
    pub(crate) const SET: u8 = 1;
    pub(crate) const COMPARE_SET: u8 = 2;
    pub(crate) const GET: u8 = 3;
    pub(crate) const ADD: u8 = 4;
    pub(crate) const CHECK: u8 = 5;
    pub(crate) const WAIT: u8 = 6;
    pub(crate) const GET_NUM_KEYS: u8 = 7;
    pub(crate) const DELETE_KEY: u8 = 8;
    pub(crate) const APPEND: u8 = 9;
    pub(crate) const MULTI_GET: u8 = 10;
    pub(crate) const MULTI_SET: u8 = 11;
    pub(crate) const CANCEL_WAIT: u8 = 12;
    pub(crate) const PING: u8 = 13;
    pub(crate) const QUEUE_PUSH: u8 = 14;
    pub(crate) const QUEUE_POP: u8 = 15;
    pub(crate) const QUEUE_LEN: u8 = 16;
    pub(crate) const LIST_KEYS: u8 = 17;
    pub(crate) const BARRIER: u8 = 18;
}

/// What a field is, for its limit.
#[derive(Clone, Copy)]
enum Field {
    Key,
    Value,
}

impl Decoder {
    /// For a connection that has just been accepted.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, is_validated: false, buffer: Vec::new(), used: 0, partial: None }
    }

    /// Takes the next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        // What has been understood makes room, at a cost that is no more than what is left.
        if self.used > 0 && self.used * 2 >= self.buffer.len() {
            self.buffer.drain(..self.used);
            self.used = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes that are held for a request that is not complete.
    #[must_use]
    pub fn held(&self) -> usize {
        let fields = self.partial.as_ref().map_or(0, |partial| usize::try_from(partial.bytes).unwrap_or(usize::MAX));
        fields.saturating_add(self.buffer.len() - self.used)
    }

    /// What has come after the last request that was taken.
    pub fn take_rest(&mut self) -> Vec<u8> {
        self.buffer.split_off(self.used)
    }

    /// Gives back the room of bytes that were all understood.
    fn settle(&mut self) {
        if self.used == self.buffer.len() {
            empty(&mut self.buffer);
            self.used = 0;
        }
    }

    /// The next request; `None` until more bytes have come.
    #[expect(clippy::should_implement_trait, reason = "not an iterator: there may be more after None")]
    pub fn next(&mut self) -> Result<Option<StoreRequest>, Refusal> {
        if !self.is_validated && !self.validate()? {
            return Ok(None);
        }
        if self.partial.is_none() {
            self.partial = self.take_array::<1>().map(|[opcode]| Partial { opcode, ..Partial::default() });
        }
        let Some(mut partial) = self.partial.take() else {
            self.settle();
            return Ok(None);
        };
        let request = self.arguments(&mut partial)?;
        if request.is_none() {
            self.partial = Some(partial);
        }
        Ok(request)
    }

    /// Whether the first message, which has no answer, is complete.
    fn validate(&mut self) -> Result<bool, Refusal> {
        match self.buffer.get(self.used) {
            None => return Ok(false),
            Some(&opcode::VALIDATE) => {}
            Some(&other) => return Err(Refusal::NoClient(other)),
        }
        let Some([_, magic @ ..]) = self.take_array::<5>() else { return Ok(false) };
        let magic = u32::from_le_bytes(magic);
        if magic != MAGIC {
            return Err(Refusal::Magic(magic));
        }
        self.is_validated = true;
        Ok(true)
    }

    fn arguments(&mut self, partial: &mut Partial) -> Result<Option<StoreRequest>, Refusal> {
        use Field::{Key, Value};

        let request = match partial.opcode {
            opcode::SET => {
                self.fields(partial, &[Key, Value])?.map(|[key, value]| StoreRequest::Set { key: boxed(key), value })
            }
            opcode::COMPARE_SET => self
                .fields(partial, &[Key, Value, Value])?
                .map(|[key, expected, desired]| StoreRequest::CompareSet { key: boxed(key), expected, desired }),
            opcode::GET => self.fields(partial, &[Key])?.map(|[key]| StoreRequest::Get { key: boxed(key) }),
            opcode::ADD => self.key_and_number(partial)?.map(|(key, delta)| StoreRequest::Add { key, delta }),
            opcode::CHECK => self.list(partial)?.map(|keys| StoreRequest::Check { keys }),
            opcode::WAIT => self.list(partial)?.map(|keys| StoreRequest::Wait { keys }),
            opcode::GET_NUM_KEYS => Some(StoreRequest::GetNumKeys),
            opcode::DELETE_KEY => {
                self.fields(partial, &[Key])?.map(|[key]| StoreRequest::DeleteKey { key: boxed(key) })
            }
            opcode::APPEND => {
                self.fields(partial, &[Key, Value])?.map(|[key, value]| StoreRequest::Append { key: boxed(key), value })
            }
            opcode::MULTI_GET => self.list(partial)?.map(|keys| StoreRequest::MultiGet { keys }),
            opcode::MULTI_SET => self.pairs(partial)?.map(|pairs| StoreRequest::MultiSet { pairs }),
            opcode::CANCEL_WAIT => Some(StoreRequest::CancelWait),
            opcode::PING => self.take_array().map(|nonce| StoreRequest::Ping { nonce: u32::from_le_bytes(nonce) }),
            opcode::QUEUE_PUSH => self
                .fields(partial, &[Key, Value])?
                .map(|[key, value]| StoreRequest::QueuePush { key: boxed(key), value }),
            opcode::QUEUE_POP => self.fields(partial, &[Key])?.map(|[key]| StoreRequest::QueuePop { key: boxed(key) }),
            opcode::QUEUE_LEN => self.fields(partial, &[Key])?.map(|[key]| StoreRequest::QueueLen { key: boxed(key) }),
            opcode::LIST_KEYS => Some(StoreRequest::ListKeys),
            opcode::BARRIER => {
                self.key_and_number(partial)?.map(|(key, world_size)| StoreRequest::Barrier { key, world_size })
            }
            UPGRADE => Some(StoreRequest::Upgrade),
            unknown => return Err(Refusal::Opcode(unknown)),
        };
        Ok(request)
    }

    fn fields<const N: usize>(
        &mut self,
        partial: &mut Partial,
        kinds: &[Field; N],
    ) -> Result<Option<[Vec<u8>; N]>, Refusal> {
        while partial.fields.len() < N {
            if !self.field(partial, kinds[partial.fields.len()])? {
                return Ok(None);
            }
        }
        Ok(std::mem::take(&mut partial.fields).try_into().ok())
    }

    fn key_and_number(&mut self, partial: &mut Partial) -> Result<Option<(Key, i64)>, Refusal> {
        if partial.fields.is_empty() && !self.field(partial, Field::Key)? {
            return Ok(None);
        }
        let Some(number) = self.take_array() else { return Ok(None) };
        Ok(partial.fields.pop().map(|key| (boxed(key), i64::from_le_bytes(number))))
    }

    fn list(&mut self, partial: &mut Partial) -> Result<Option<Vec<Key>>, Refusal> {
        if !self.fields_of_list(partial, &[Field::Key])? {
            return Ok(None);
        }
        Ok(Some(std::mem::take(&mut partial.fields).into_iter().map(boxed).collect()))
    }

    fn pairs(&mut self, partial: &mut Partial) -> Result<Option<Vec<(Key, Value)>>, Refusal> {
        if !self.fields_of_list(partial, &[Field::Key, Field::Value])? {
            return Ok(None);
        }
        let mut fields = std::mem::take(&mut partial.fields).into_iter();
        let mut pairs = Vec::with_capacity(fields.len() / 2);
        while let (Some(key), Some(value)) = (fields.next(), fields.next()) {
            pairs.push((boxed(key), value));
        }
        Ok(Some(pairs))
    }

    /// Whether all fields of a list are there, each of whose elements has fields of these kinds.
    fn fields_of_list(&mut self, partial: &mut Partial, kinds: &[Field]) -> Result<bool, Refusal> {
        let count = match partial.count {
            Some(count) => count,
            None => match self.take_array() {
                Some(count) => u64::from_le_bytes(count),
                None => return Ok(false),
            },
        };
        within("a number of keys", count, self.limits.keys)?;
        partial.count = Some(count);
        // It fits: there is a limit to the number of keys.
        let expected = usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(kinds.len());
        while partial.fields.len() < expected {
            if !self.field(partial, kinds[partial.fields.len() % kinds.len()])? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the next field was there and was taken.
    fn field(&mut self, partial: &mut Partial, kind: Field) -> Result<bool, Refusal> {
        let Some(announced) = self.buffer[self.used..].first_chunk() else { return Ok(false) };
        let size = u64::from_le_bytes(*announced);
        match kind {
            Field::Key => within("a key", size, self.limits.key_bytes)?,
            Field::Value => within("a value", size, self.limits.value_bytes)?,
        }
        within("a request", partial.bytes.saturating_add(size), self.limits.request_bytes)?;
        let start = self.used + size_of::<u64>();
        let Some(bytes) = usize::try_from(size).ok().and_then(|size| self.buffer.get(start..start.checked_add(size)?))
        else {
            return Ok(false);
        };
        partial.fields.push(bytes.to_vec());
        partial.bytes += size;
        self.used = start + partial.fields.last().map_or(0, Vec::len);
        Ok(true)
    }

    fn take_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let array = *self.buffer[self.used..].first_chunk()?;
        self.used += N;
        Some(array)
    }
}

/// Empties a buffer of a connection. Frees a large buffer instead of shrinking it, because shrinking would fragment the heap.
pub(crate) fn empty(buffer: &mut Vec<u8>) {
    if buffer.capacity() > KEPT_ROOM {
        *buffer = Vec::new();
    } else {
        buffer.clear();
    }
}

fn boxed(key: Vec<u8>) -> Key {
    key.into_boxed_slice()
}

fn within(what: &'static str, size: u64, limit: u64) -> Result<(), Refusal> {
    if size <= limit { Ok(()) } else { Err(Refusal::TooLarge { what, size, limit }) }
}
