// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @notice The cheat codes of forge that the tests use.
interface Vm {
    function addr(uint256 key) external pure returns (address);
    function assume(bool condition) external pure;
    function blobhashes(bytes32[] calldata hashes) external;
    function chainId(uint256 id) external;
    function deal(address account, uint256 balance_wei) external;
    function etch(address account, bytes calldata code) external;
    function expectEmit() external;
    function expectRevert() external;
    function expectRevert(bytes4 selector) external;
    function expectRevert(bytes calldata data) external;
    function fee(uint256 basefee_wei) external;
    function label(address account, string calldata name) external;
    function prank(address sender) external;
    function prank(address sender, address origin) external;
    function startPrank(address sender) external;
    function stopPrank() external;
    function recordLogs() external;
    function revertToState(uint256 snapshot) external returns (bool);
    function roll(uint256 number) external;
    function sign(uint256 key, bytes32 digest) external pure returns (uint8 v, bytes32 r, bytes32 s);
    function snapshotState() external returns (uint256 snapshot);
    function snapshotGasLastCall(string calldata group, string calldata name) external returns (uint256);
    function store(address account, bytes32 slot, bytes32 value) external;
    function load(address account, bytes32 slot) external view returns (bytes32);
    function toString(bytes calldata value) external pure returns (string memory);
    function toString(int256 value) external pure returns (string memory);
    function toString(uint256 value) external pure returns (string memory);
    function warp(uint256 time_s) external;
}

/// @title Base of all contract tests: the cheat codes and assertions (forge-std has no npm release of its own)
abstract contract Base {
    // SAFETY: forge's fixed address of the cheat codes.
    Vm internal constant vm = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));

    error Unequal(string what, string expected, string actual);
    error Untrue(string what);

    function assertTrue(bool condition, string memory what) internal pure {
        if (!condition) revert Untrue(what);
    }

    function assertEq(uint256 actual, uint256 expected, string memory what) internal pure {
        if (actual != expected) revert Unequal(what, vm.toString(expected), vm.toString(actual));
    }

    function assertEq(int256 actual, int256 expected, string memory what) internal pure {
        if (actual != expected) revert Unequal(what, vm.toString(expected), vm.toString(actual));
    }

    function assertEq(bytes32 actual, bytes32 expected, string memory what) internal pure {
        if (actual != expected) {
            revert Unequal(what, vm.toString(bytes.concat(expected)), vm.toString(bytes.concat(actual)));
        }
    }

    function assertEq(address actual, address expected, string memory what) internal pure {
        assertEq(bytes32(uint256(uint160(actual))), bytes32(uint256(uint160(expected))), what);
    }

    function assertEq(bool actual, bool expected, string memory what) internal pure {
        assertEq(uint256(actual ? 1 : 0), uint256(expected ? 1 : 0), what);
    }

    function assertEq(bytes memory actual, bytes memory expected, string memory what) internal pure {
        if (keccak256(actual) != keccak256(expected)) revert Unequal(what, vm.toString(expected), vm.toString(actual));
    }

    /// @notice `value` folded into low..high, so that fuzzing wastes no run.
    function bound(uint256 value, uint256 low, uint256 high) internal pure returns (uint256) {
        if (value >= low && value <= high) return value;
        return high - low == type(uint256).max ? value : low + value % (high - low + 1);
    }

    /// @notice As `bound`, for signed values.
    function bound(int256 value, int256 low, int256 high) internal pure returns (int256) {
        if (value >= low && value <= high) return value;
        uint256 width = uint256(high) - uint256(low) + 1;
        return int256(uint256(low) + uint256(value) % width);
    }
}
