// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Models} from "../../contracts/src/Models.sol";
import {IModels} from "../../contracts/src/interfaces/IModels.sol";
import {Model} from "../../contracts/src/interfaces/IReferee.sol";
import {Market} from "./Market.t.sol";

contract ModelsTest is Market {
    function setUp() public {
        models = new Models();
    }

    function test_register_revertsOnEveryInvalidField() public {
        Model memory m = _model();
        m.weightsRoot = 0;
        _refuse(m, "weightsRoot");
        m = _model();
        m.weightsLeaves = 0;
        _refuse(m, "weightsLeaves");
        m = _model();
        m.programRoot = 0;
        _refuse(m, "programRoot");
        m = _model();
        m.programLeaves = 0;
        _refuse(m, "programLeaves");
        m = _model();
        m.profileRoot = 0;
        _refuse(m, "profileRoot");
        m = _model();
        m.profileLeaves = 0;
        _refuse(m, "profileLeaves");
        m = _model();
        m.layers = 0;
        _refuse(m, "layers");
        m.layers = 1025;
        _refuse(m, "layers");
        m = _model();
        m.hidden = 0;
        _refuse(m, "hidden");
        m.hidden = 2 ** 20 + 1;
        _refuse(m, "hidden");
        m = _model();
        m.queryWidth = 0;
        _refuse(m, "queryWidth");
        m.queryWidth = 2 ** 20 + 1;
        _refuse(m, "queryWidth");
        m = _model();
        m.kvWidth = 0;
        _refuse(m, "kvWidth");
        m.kvWidth = 2 ** 20 + 1;
        _refuse(m, "kvWidth");
        m = _model();
        m.vocabulary = 0;
        _refuse(m, "vocabulary");
        m.vocabulary = 2 ** 24 + 1;
        _refuse(m, "vocabulary");
        m = _model();
        m.maxPositions = 1;
        _refuse(m, "maxPositions");
        m.maxPositions = 2 ** 20 + 1;
        _refuse(m, "maxPositions");
        m = _model();
        m.weightDtype = 3;
        _refuse(m, "weightDtype");
        m = _model();
        m.servedDtype = 3;
        _refuse(m, "servedDtype");
    }

    function test_register_acceptsTheBounds() public {
        Model memory m = _model();
        m.layers = 1024;
        m.hidden = m.queryWidth = m.kvWidth = m.maxPositions = 2 ** 20;
        m.vocabulary = 2 ** 24;
        m.weightDtype = m.servedDtype = 2;
        assertEq(models.layers(models.register(m)), 1024, "layers");
        m.layers = m.hidden = m.queryWidth = m.kvWidth = m.vocabulary = 1;
        m.maxPositions = 2;
        assertEq(models.layers(models.register(m)), 1, "layers");
    }

    function test_register_namesTheModelByItsHash() public {
        bytes32 expected = keccak256(abi.encode(_model()));
        assertEq(models.layers(expected), 0, "layers of an unknown model");
        vm.expectEmit();
        emit IModels.ModelRegistered(expected, _model());
        assertEq(models.register(_model()), expected, "id");
        assertEq(models.layers(expected), LAYERS, "layers");
    }

    function test_register_againChangesNothing() public {
        bytes32 id = models.register(_model());
        assertEq(models.register(_model()), id, "id");
        assertEq(models.layers(id), LAYERS, "layers");
    }

    function testFuzz_register_everyFieldCounts(uint64 leaves, uint32 layers) public {
        Model memory m = _model();
        bytes32 plain = models.register(m);
        m.weightsLeaves = uint64(bound(leaves, 2, type(uint64).max));
        m.layers = uint32(bound(layers, 1, 1024));
        assertTrue(models.register(m) != plain, "another model has another id");
    }

    function _refuse(Model memory m, string memory what) private {
        vm.expectRevert(abi.encodeWithSelector(IModels.InvalidModel.selector, what));
        models.register(m);
    }
}
